"""sample_op: the value of each token and its gradient."""

import torch
from torch import Tensor

from rlhf_fast import sample_op
from rlhf_fast.bench.workload import (
    COMPILED,
    COPY,
    EAGER,
    OURS,
    Contest,
    Sizes,
    Work,
    Workload,
    compiled,
    copying,
    forward_backward,
    leaf,
)


def build(sizes: Sizes, device: torch.device) -> Contest:
    shape = (sizes["sequences"], sizes["tokens"])
    x, upstream = leaf(torch.randn(shape, device=device)), torch.randn(shape, device=device)
    mask = torch.rand(shape, device=device) < 0.8
    fast = compiled(naive)
    return Contest(
        {
            OURS: lambda: forward_backward(ours, x, mask, upstream=upstream),
            EAGER: lambda: forward_backward(naive, x, mask, upstream=upstream),
            COMPILED: lambda: forward_backward(fast, x, mask, upstream=upstream),
            COPY: copying(upstream),
        },
        names=("y", "gradient"),
        truth=lambda: forward_backward(naive, leaf(x.double()), mask, upstream=upstream.double()),
        # forward: a tensor and the mask read, one written; backward: two and the mask read, one written
        work=Work("bytes", 5 * x.nbytes + 2 * mask.nbytes, COPY, 2 * x.nbytes),
    )


def ours(x: Tensor, mask: Tensor) -> Tensor:
    return sample_op(x, mask, scale=2.0)


def naive(x: Tensor, mask: Tensor) -> Tensor:
    return (x * 2.0) * mask


WORKLOADS = [
    Workload(
        "sample_op",
        "{sequences} x {tokens}, forward + backward",
        {"sequences": 1024, "tokens": 1024},
        {"sequences": 8, "tokens": 64},
        build,
    )
]
GPU_WORKLOADS = WORKLOADS
