"""masked_logprobs: log-probabilities of the targets, and the gradient of the logits, written in their place."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import masked_logprobs
from rlhf_fast.bench import peers
from rlhf_fast.bench.workload import (
    COMPILED,
    COPY,
    EAGER,
    OURS,
    Contest,
    Mark,
    Sizes,
    Work,
    Workload,
    compiled,
    copying,
    forward_backward,
    leaf,
)


def build(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Contest:
    # random bfloat16 numbers whatever the dtype, so that each contestant is given exactly the same ones
    kept = torch.randn(sizes["tokens"], sizes["vocab"], device=device).mul_(3).bfloat16().to(dtype)
    targets = torch.randint(sizes["vocab"], (sizes["tokens"],), device=device)
    upstream = torch.randn(sizes["tokens"], device=device).bfloat16().float()
    logits, logits_fp32 = leaf(kept), leaf(kept.float())
    do = functools.partial(forward_backward, upstream=upstream)
    fused = functools.partial(masked_logprobs, inplace_backward=True)
    fast = compiled(naive)

    elsewhere = torch.zeros_like(logits_fp32, requires_grad=False)

    def fresh() -> None:
        logits.detach().copy_(kept)
        logits_fp32.detach().copy_(kept)
        elsewhere.add_(1)  # else whichever was restored last would be in the cache

    runs = {
        OURS: lambda: do(fused, logits, targets),
        EAGER: lambda: do(naive, logits, targets),
        COMPILED: lambda: do(fast, logits, targets),
        "F.cross_entropy": lambda: do(cross_entropy, logits, targets),
        "TRL": lambda: do(peers.selective_log_softmax(), logits, targets),
        COPY: copying(kept),
    }
    if dtype != torch.float32:
        runs["rlhf-fast, fp32"] = lambda: do(fused, logits_fp32, targets)[:0]
    return Contest(
        runs,
        names=("logprobs", "gradient"),
        truth=lambda: forward_backward(
            naive, leaf(kept[:64].double()), targets[:64], upstream=upstream[:64].double()
        ),  # fmt: skip
        # logits read twice, their gradient written once
        work=Work("bytes", 3 * kept.nbytes, COPY, 2 * kept.nbytes),
        fresh=fresh,
    )


def naive(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits, targets, reduction="none")


SIZES, QUICK = {"tokens": 512, "vocab": 49152}, {"tokens": 64, "vocab": 1000}
WORKLOADS = [
    Workload(
        "masked_logprobs",
        "{tokens} x {vocab} fp32, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build, torch.float32),
        (Mark("faster", 8, EAGER), Mark("faster", 4, COMPILED), Mark("faster", 6, "TRL"), Mark("within", 3, COPY)),
    ),
    Workload(
        "masked_logprobs",
        "{tokens} x {vocab} bf16, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build, torch.bfloat16),
        (Mark("within", 1, "rlhf-fast, fp32"), Mark("faster", 8, EAGER)),
    ),
]
