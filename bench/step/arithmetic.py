"""The arithmetic floor: the time of the matrix products with the base alone, at the best rate of a product here."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

import rlhf_fast

SIDE, REPEATS = 2048, 12


def peaks(quick: bool) -> dict[str, float]:
    """FLOP/s of a product of two square matrices by torch or by the engine, the best of several, for each dtype."""
    side, found = 256 if quick else SIDE, {}
    for name in ("bfloat16", "float32"):
        left, right = torch.randn(2, side, side, dtype=getattr(torch, name))
        best = min(
            min(seconds(torch.mm, left, right), seconds(rlhf_fast.lora_linear, left, right, None))
            for _ in range(REPEATS)
        )
        found[name] = 2 * side**3 / best
    return found


def seconds(function: Callable[..., Any], *args: Any) -> float:
    start = perf_counter()
    function(*args)
    return perf_counter() - start


def flop(
    stage: str, work: dict[str, Any], trained_layers: int | None = None, one_micro_batch: bool = False
) -> dict[str, float]:
    """FLOP of a step's products with the base's weights, by phase; a stage without phases has ``step`` alone.

    A product of n tokens with w weights is 2nw forward and 2nw for the gradient of its input; frozen weights have no
    gradient. Left out: attention scores, adapters, heads of width 1. ``trained_layers``: adapters on the top layers
    alone, so that the layers below run once for all roles and epochs. ``one_micro_batch``: the first epoch of PPO
    trains on the states that scoring computed.
    """
    shape, tokens = work["shape"], work["tokens"]
    layers = shape["layers"]
    top = shape["layer"] * (trained_layers or layers)
    below = shape["layer"] * layers - top
    head = shape["hidden"] * shape["vocabulary"]
    if stage == "sft":
        return {"step": tokens["sft"] * (2 * below + 4 * top) + 4 * tokens["sft_trained"] * head}
    if stage == "reward":
        return {"step": tokens["reward"] * (2 * below + 4 * top)}
    responses = tokens["responses"]
    every = tokens["prompts"] + responses
    rollout = 2 * every * (below + top) + 2 * responses * head
    if stage == "rollout":
        return {"step": rollout}
    passes = 4 * work["ppo_epochs"] - (2 if one_micro_batch else 0)  # of policy and critic, forward and backward
    return {
        "rollout": rollout,
        "score": 2 * every * (below + 4 * top) + 2 * 2 * responses * head,  # policy and reference; critic, reward model
        "update": 2 * passes * every * top + 4 * work["ppo_epochs"] * responses * head,
    }
