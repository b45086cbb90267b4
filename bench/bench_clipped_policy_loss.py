"""clipped_policy_loss: PPO's loss with its statistics, and the gradient of the log-probs."""

import dataclasses

import torch
from torch import Tensor

from rlhf_fast import clipped_policy_loss
from rlhf_fast.bench.workload import (
    COMPILED,
    COPY,
    EAGER,
    OURS,
    Contest,
    Mark,
    Results,
    Sizes,
    Work,
    Workload,
    compiled,
    copying,
    leaf,
)


def build(sizes: Sizes, device: torch.device) -> Contest:
    shape = (sizes["sequences"], sizes["tokens"])
    # multiples of 1/64, so that rounding cannot move a ratio across a clip bound
    logprobs = leaf(-torch.randint(0, 320, shape, device=device) / 64)
    old_logprobs = (logprobs + (0.2 * 64 * torch.randn(shape, device=device)).round() / 64).detach()
    advantages = torch.randn(shape, device=device)
    mask = torch.rand(shape, device=device) < 0.8
    inputs = (logprobs, old_logprobs, advantages, mask)
    fast = compiled(naive)

    def truth() -> Results:
        exact = leaf(logprobs.double())
        return gradient(naive(exact, old_logprobs.double(), advantages.double(), mask), exact)

    return Contest(
        {
            OURS: lambda: gradient(clipped_policy_loss(*inputs), logprobs),
            EAGER: lambda: gradient(naive(*inputs), logprobs),
            COMPILED: lambda: gradient(fast(*inputs), logprobs),
            COPY: copying(advantages),
        },
        names=("loss", "clip_fraction", "approx_kl", "ratio_mean", "ratio_max", "ratio_var", "gradient"),
        truth=truth,
        # three tensors and the mask read, the gradient written
        work=Work("bytes", 4 * advantages.nbytes + mask.nbytes, COPY, 2 * advantages.nbytes),
    )


def gradient(outputs: tuple[Tensor, ...], logprobs: Tensor) -> Results:
    return *(output.detach() for output in outputs), *torch.autograd.grad(outputs[0], logprobs)


def naive(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The loss, and the statistics that trainers log with it."""
    count = mask.sum()
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, at_bound = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    loss = (torch.max(unclipped, at_bound) * mask).sum() / count
    with torch.no_grad():
        ratio_mean = (ratio * mask).sum() / count
        return (
            loss,
            ((at_bound > unclipped) * mask).sum() / count,
            (0.5 * log_ratio.square() * mask).sum() / count,
            ratio_mean,
            (ratio * mask).max(),
            ((ratio - ratio_mean).square() * mask).sum() / count,
        )


WORKLOADS = [
    Workload(
        "clipped_policy_loss",
        "{sequences} x {tokens}, forward + backward",
        {"sequences": 1024, "tokens": 1024},
        {"sequences": 8, "tokens": 64},
        build,
        (Mark("faster", 5, EAGER), Mark("faster", 1.5, COMPILED)),
    )
]
GPU_WORKLOADS = [dataclasses.replace(workload, marks=()) for workload in WORKLOADS]
