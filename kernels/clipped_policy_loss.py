"""PPO's clipped policy loss: ppo_loss without a value, with ratios by the sequence where they are asked for."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED, bounded_log_ratio, exponential
from .ppo_loss import ppo_loss
from .tokens import live_at, load_kept, tile_of


@triton.jit
def _sequence_ratio(logprobs, old_logprobs, live, ratios, length, TILE: tl.constexpr):
    """exp(mean log ratio over the live tokens of the sequence)."""
    sequence = tl.program_id(0).to(tl.int64)
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.float64)
    for start in range(0, length, TILE):
        offset = start + tl.arange(0, TILE)
        inside = offset < length
        index = sequence * length + offset
        counted = live_at(live, index, inside)
        log_ratio = load_kept(logprobs, index, inside, counted) - load_kept(old_logprobs, index, inside, counted)
        total += tl.sum(bounded_log_ratio(log_ratio)).to(tl.float64)
        count += tl.sum(counted.to(tl.float32)).to(tl.float64)
    tl.store(ratios + sequence, exponential((total / tl.maximum(count, 1.0)).to(tl.float32)))


def clipped_policy_loss(
    sequences: int,
    length: int,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    live: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    sequence_level: bool,
    aggregation: int,
    num_items: float | Tensor,
    loss: Tensor,
    statistics: Tensor,
    grad: Tensor | None,
    threads: int,
) -> None:
    ratios = torch.empty(sequences, dtype=torch.float32, device=logprobs.device) if sequence_level else None
    if ratios is not None and sequences > 0:
        _sequence_ratio[(sequences,)](
            logprobs, old_logprobs, live, ratios, length, TILE=tile_of(length), num_warps=4, **FUSED
        )
    ppo_loss(
        sequences, length, logprobs, old_logprobs, advantages, None, None, None, None, None, live, clip_low, clip_high,
        dual_clip, math.inf, 0.0, 0.0, 0.0, 0, 0, aggregation, num_items, loss, statistics, grad, None, None, threads,
        ratios,
    )  # fmt: skip
