"""masked_whiten: advantages to mean 0 and variance 1 over the live tokens, without a gradient, as PPO does."""

import torch
from torch import Tensor

from rlhf_fast import masked_whiten
from rlhf_fast.bench.workload import COMPILED, COPY, EAGER, OURS, Contest, Sizes, Work, Workload, compiled, copying


def build(sizes: Sizes, device: torch.device) -> Contest:
    shape = (sizes["sequences"], sizes["tokens"])
    x = 2 * torch.randn(shape, device=device) + 0.5
    mask = torch.rand(shape, device=device) < 0.8
    fast = compiled(naive)
    return Contest(
        {
            OURS: lambda: (masked_whiten(x, mask),),
            EAGER: lambda: (naive(x, mask),),
            COMPILED: lambda: (fast(x, mask),),
            COPY: copying(x),
        },
        names=("whitened",),
        truth=lambda: (naive(x.double(), mask),),
        work=Work("bytes", 2 * x.nbytes + mask.nbytes, COPY, 2 * x.nbytes),  # read once, written once
    )


def naive(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


WORKLOADS = [
    Workload(
        "masked_whiten",
        "{sequences} x {tokens}",
        {"sequences": 1024, "tokens": 1024},
        {"sequences": 8, "tokens": 64},
        build,
    )
]
GPU_WORKLOADS = WORKLOADS
