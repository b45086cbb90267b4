"""exact_kl: KL over the whole vocabulary from two sets of logits, and the gradient of the policy's."""

import functools

import torch
from torch import Tensor

from rlhf_fast import exact_kl
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


def build(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Contest:
    kept = (3 * torch.randn(sizes["tokens"], sizes["vocab"], device=device)).to(dtype)
    logits, ref_logits = leaf(kept), kept + torch.randn_like(kept)
    upstream = torch.randn(sizes["tokens"], device=device)
    do = functools.partial(forward_backward, upstream=upstream)
    in_place, fast = functools.partial(exact_kl, inplace_backward=True), compiled(naive)
    return Contest(
        {
            OURS: lambda: do(exact_kl, logits, ref_logits),
            f"{OURS}, in place": lambda: do(in_place, logits, ref_logits),
            EAGER: lambda: do(naive, logits, ref_logits),
            COMPILED: lambda: do(fast, logits, ref_logits),
            COPY: copying(ref_logits),
        },
        names=("kl", "gradient"),
        truth=lambda: forward_backward(
            naive, leaf(kept[:64].double()), ref_logits[:64].double(), upstream=upstream[:64].double()
        ),
        # both sets read forward and backward, the gradient written
        work=Work("bytes", 5 * logits.nbytes, COPY, 2 * logits.nbytes),
        fresh=lambda: logits.detach().copy_(kept),
    )


def naive(logits: Tensor, ref_logits: Tensor) -> Tensor:
    policy, reference = torch.log_softmax(logits, dim=-1), torch.log_softmax(ref_logits, dim=-1)
    return (policy.exp() * (policy - reference)).sum(-1)


WORKLOADS = [
    Workload(
        "exact_kl",
        "{tokens} x {vocab} fp32, forward + backward",
        {"tokens": 512, "vocab": 49152},
        {"tokens": 64, "vocab": 1000},
        functools.partial(build, torch.float32),
    )
]
GPU_WORKLOADS = [
    Workload(
        "exact_kl",
        "{tokens} x {vocab} bf16, forward + backward",
        {"tokens": 4096, "vocab": 151936},
        {"tokens": 64, "vocab": 1000},
        functools.partial(build, torch.bfloat16),
    )
]
