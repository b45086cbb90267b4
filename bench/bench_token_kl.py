"""token_kl: the k3 estimate of each token and its gradient."""

import functools

import torch
from torch import Tensor

from rlhf_fast import token_kl
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
    logprobs = leaf(-torch.rand(shape, device=device) * 5)
    ref_logprobs = (logprobs + 0.3 * torch.randn(shape, device=device)).detach()
    mask = torch.rand(shape, device=device) < 0.8
    upstream = torch.randn(shape, device=device)
    do = functools.partial(forward_backward, upstream=upstream)
    fused, fast = functools.partial(token_kl, estimator="k3"), compiled(naive)
    inputs = (logprobs, ref_logprobs, mask)
    return Contest(
        {
            OURS: lambda: do(fused, *inputs),
            EAGER: lambda: do(naive, *inputs),
            COMPILED: lambda: do(fast, *inputs),
            COPY: copying(ref_logprobs),
        },
        names=("kl", "gradient"),
        truth=lambda: forward_backward(
            naive, leaf(logprobs.double()), ref_logprobs.double(), mask, upstream=upstream.double()
        ),
        # forward: two tensors and the mask read, one written; backward: three and the mask read, one written
        work=Work("bytes", 7 * upstream.nbytes + 2 * mask.nbytes, COPY, 2 * upstream.nbytes),
    )


def naive(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    difference = ref_logprobs - logprobs
    return (difference.exp() - 1 - difference) * mask


WORKLOADS = [
    Workload(
        "token_kl",
        "k3, {sequences} x {tokens}, forward + backward",
        {"sequences": 1024, "tokens": 1024},
        {"sequences": 8, "tokens": 64},
        build,
    )
]
GPU_WORKLOADS = WORKLOADS
