"""What a call costs apart from the work: 64 tokens, where that is next to nothing, beside one op call of torch."""

import torch
import torch.nn.functional as F

from rlhf_fast import clipped_policy_loss, masked_logprobs, token_kl
from rlhf_fast.bench.workload import OURS, Contest, Mark, Sizes, Workload, leaf


def logprobs(sizes: Sizes, device: torch.device) -> Contest:
    tokens = sizes["tokens"]
    logits = leaf(torch.randn(tokens, 64, device=device))
    targets = torch.randint(64, (tokens,), device=device)

    def ours() -> tuple[()]:
        masked_logprobs(logits, targets)
        return ()

    def torch_call() -> tuple[()]:
        F.cross_entropy(logits, targets, reduction="none")
        return ()

    return Contest({OURS: ours, "F.cross_entropy": torch_call})


def kl(sizes: Sizes, device: torch.device) -> Contest:
    policy, reference = leaf(-torch.rand(sizes["tokens"], device=device)), -torch.rand(sizes["tokens"], device=device)

    def ours() -> tuple[()]:
        token_kl(policy, reference)
        return ()

    def torch_call() -> tuple[()]:
        F.kl_div(policy, reference, reduction="none", log_target=True)
        return ()

    return Contest({OURS: ours, "F.kl_div": torch_call})


def policy_loss(sizes: Sizes, device: torch.device) -> Contest:
    new, old, advantages = torch.randn(3, sizes["tokens"], device=device).unbind()
    new = leaf(new)

    def ours() -> tuple[()]:
        clipped_policy_loss(new, old, advantages)
        return ()

    def torch_call() -> tuple[()]:
        F.huber_loss(new, old)
        return ()

    return Contest({OURS: ours, "F.huber_loss": torch_call})


SIZES = {"tokens": 64}
WORKLOADS = [
    Workload(
        "masked_logprobs", "a call on {tokens} tokens", SIZES, SIZES, logprobs, (Mark("above", 40, "F.cross_entropy"),)
    ),
    Workload("token_kl", "a call on {tokens} tokens", SIZES, SIZES, kl, (Mark("above", 40, "F.kl_div"),)),
    Workload(
        "clipped_policy_loss",
        "a call on {tokens} tokens",
        SIZES,
        SIZES,
        policy_loss,
        (Mark("above", 40, "F.huber_loss"),),
    ),
]
