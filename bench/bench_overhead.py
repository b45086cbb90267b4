"""The fixed cost of a call: 64 tokens, where the work itself is negligible, compared with one call of a torch op.

On a GPU: every op with the arguments that a trainer passes, and the host time of the call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_fast
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


def call(op: str, sizes: Sizes, device: torch.device) -> Contest:
    function, arguments = functools.partial(getattr(rlhf_fast, op), **OPTIONS.get(op, {})), CALLS[op]
    given = arguments(functools.partial(torch.rand, device=device), sizes["tokens"])

    def ours() -> tuple[()]:
        function(*given)
        return ()

    return Contest({OURS: ours})


Random = Callable[..., Tensor]
VOCAB, HIDDEN = 256, 64


def head(random: Random, tokens: int) -> tuple[Tensor, ...]:
    return leaf(random(tokens, HIDDEN)), random(VOCAB, HIDDEN), targets(random, tokens)


def targets(random: Random, tokens: int) -> Tensor:
    return (random(tokens) * VOCAB).long()


CALLS: dict[str, Callable[[Random, int], tuple[Any, ...]]] = {
    "masked_logprobs": lambda random, n: (leaf(random(n, VOCAB)), targets(random, n)),
    "exact_kl": lambda random, n: (leaf(random(n, VOCAB)), random(n, VOCAB)),
    "linear_logprobs": head,
    "linear_cross_entropy": head,
    "linear_policy_loss": lambda random, n: (*head(random, n), random(n), random(n)),
    "linear_policy_ref": lambda random, n: (head(random, n)[0], *head(random, n)),
    "lora_linear": lambda random, n: (
        leaf(random(n, HIDDEN)),
        random(HIDDEN, HIDDEN),
        (leaf(random(16, HIDDEN)), leaf(random(HIDDEN, 16)), 2.0),
    ),
    "token_kl": lambda random, n: (leaf(random(n)), random(n)),
    "clipped_policy_loss": lambda random, n: (leaf(random(n)), random(n), random(n)),
    "clipped_value_loss": lambda random, n: (leaf(random(n)), random(n), random(n)),
    "ppo_loss": lambda random, n: (
        leaf(random(n)),
        random(n),
        random(n),
        leaf(random(n)),
        random(n),
        random(n),
    ),  # fmt: skip
    "gae": lambda random, n: (random(4, n // 4), random(4, n // 4)),
    "masked_whiten": lambda random, n: (random(n),),
    "rms_norm": lambda random, n: (leaf(random(n, HIDDEN)), random(HIDDEN)),
    "gated_activation": lambda random, n: (leaf(random(n, HIDDEN)), leaf(random(n, HIDDEN))),
    "rotary_embedding": lambda random, n: (leaf(random(1, 2, n, HIDDEN)), *random(2, 1, n, HIDDEN)),
}
OPTIONS = {"rms_norm": {"eps": 1e-5}}
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
GPU_WORKLOADS = [
    Workload(op, "a call on {tokens} tokens", SIZES, SIZES, functools.partial(call, op), (Mark("host", 30),))
    for op in CALLS
]
