"""ppo_loss: policy, value, KL and entropy with their statistics, and the gradients of all three inputs."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import clipped_policy_loss, clipped_value_loss, ppo_loss, token_kl
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

TRAINED = ("logprobs", "values", "entropy")
VALUE_COEF, KL_COEF, ENTROPY_COEF = 0.1, 0.05, 0.01
NAMES = (
    "loss", "policy_loss", "value_loss", "kl", "entropy", "clip_fraction", "approx_kl", "ratio_mean", "ratio_max",
    "ratio_var", "value_clip_fraction",
)  # fmt: skip


def build(sizes: Sizes, device: torch.device) -> Contest:
    shape = (sizes["sequences"], sizes["tokens"])

    # multiples of 1/64, so that rounding cannot move a token across a clip bound
    def normal(scale: float) -> Tensor:
        return (64 * scale * torch.randn(shape, device=device)).round() / 64

    x: dict[str, Any] = {"logprobs": -torch.randint(0, 320, shape, device=device) / 64}
    x["values"], x["returns"] = normal(1), normal(1)
    x["old_logprobs"], x["ref_logprobs"] = x["logprobs"] + normal(0.2), x["logprobs"] + normal(0.2)
    x["advantages"], x["old_values"] = normal(1), x["values"] + normal(0.25)
    x["entropy"] = torch.rand(shape, device=device)
    x = {name: leaf(tensor) if name in TRAINED else tensor for name, tensor in x.items()}
    mask = torch.rand(shape, device=device) < 0.8
    fast = compiled(naive)

    def truth() -> Results:
        exact = {name: leaf(tensor.double()) for name, tensor in x.items()}
        return gradients(naive(**exact, mask=mask), exact)

    weights: dict[str, Any] = {"value_coef": VALUE_COEF, "kl_coef": KL_COEF, "entropy_coef": ENTROPY_COEF}
    size = mask.numel() * 4
    return Contest(
        {
            OURS: lambda: gradients(ppo_loss(**x, mask=mask, **weights), x),
            f"{OURS}, part by part": lambda: gradients(parts(**x, mask=mask), x),
            EAGER: lambda: gradients(naive(**x, mask=mask), x),
            COMPILED: lambda: gradients(fast(**x, mask=mask), x),
            COPY: copying(x["returns"]),
        },
        names=(*NAMES, *(f"gradient of {name}" for name in TRAINED)),
        truth=truth,
        # eight tensors and the mask read, three gradients written
        work=Work("bytes", 11 * size + mask.nbytes, COPY, 2 * size),
    )


def gradients(outputs: tuple[Tensor, ...], x: dict[str, Tensor]) -> Results:
    grads = torch.autograd.grad(outputs[0], [x[name] for name in TRAINED])
    return *(output.detach() for output in outputs), *grads


def parts(*, mask: Tensor, **x: Tensor) -> tuple[Tensor, ...]:
    """One function per term instead of ppo_loss."""
    policy = clipped_policy_loss(x["logprobs"], x["old_logprobs"], x["advantages"], mask)
    value = clipped_value_loss(x["values"], x["old_values"], x["returns"], mask)
    count = mask.sum()
    kl = token_kl(x["logprobs"], x["ref_logprobs"], mask, estimator="k3").sum() / count
    entropy = (x["entropy"] * mask).sum() / count
    loss = policy.loss + VALUE_COEF * value.loss + KL_COEF * kl - ENTROPY_COEF * entropy
    return loss, policy.loss, value.loss, kl, entropy, *policy[1:], value.clip_fraction


def naive(*, mask: Tensor, **x: Tensor) -> tuple[Tensor, ...]:
    """The loss, and the statistics that trainers log with it."""
    count = mask.sum()

    def mean(values: Tensor) -> Tensor:
        return (values * mask).sum() / count

    log_ratio, advantages = x["logprobs"] - x["old_logprobs"], x["advantages"]
    ratio = log_ratio.exp()
    unclipped, at_bound = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    policy = mean(torch.max(unclipped, at_bound))
    held = torch.clamp(x["values"], x["old_values"] - 0.2, x["old_values"] + 0.2)
    error, held_error = (x["values"] - x["returns"]).square(), (held - x["returns"]).square()
    value = 0.5 * mean(torch.max(error, held_error))
    difference = x["ref_logprobs"] - x["logprobs"]
    kl, entropy = mean(difference.exp() - 1 - difference), mean(x["entropy"])
    loss = policy + VALUE_COEF * value + KL_COEF * kl - ENTROPY_COEF * entropy
    with torch.no_grad():
        ratio_mean = mean(ratio)
        return (
            loss, policy, value, kl, entropy, mean(at_bound > unclipped), mean(0.5 * log_ratio.square()), ratio_mean,
            (ratio * mask).max(), mean((ratio - ratio_mean).square()), mean(held_error > error),
        )  # fmt: skip


WORKLOADS = [
    Workload(
        "ppo_loss",
        "{sequences} x {tokens}, policy + value + KL + entropy, forward + backward",
        {"sequences": 1024, "tokens": 1024},
        {"sequences": 8, "tokens": 64},
        build,
    )
]
GPU_WORKLOADS = [dataclasses.replace(WORKLOADS[0], marks=(Mark("share", 0.8, COPY),))]
