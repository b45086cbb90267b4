"""PPO's clipped policy loss, its gradient and its statistics in one sweep over the tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED, bounded_log_ratio, exponential, policy_token
from .tokens import (
    PARTS,
    TILE,
    WARPS,
    Shares,
    live_at,
    load_kept,
    load_part,
    merge_moments,
    sequence_at,
    tile_moments,
    tile_of,
    tile_of_tokens,
    token_share,
)


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
        total += tl.sum(bounded_log_ratio(_log_ratio(logprobs, old_logprobs, index, inside, counted))).to(tl.float64)
        count += tl.sum(counted.to(tl.float32)).to(tl.float64)
    tl.store(ratios + sequence, exponential((total / tl.maximum(count, 1.0)).to(tl.float32)))


@triton.jit
def _log_ratio(logprobs, old_logprobs, index, inside, counted):
    logprob = tl.load(logprobs + index, mask=inside, other=0.0)
    return tl.where(counted, logprob - tl.load(old_logprobs + index, mask=inside, other=0.0), 0.0)


@triton.jit(do_not_specialize=["length"])
def _evaluate(
    logprobs,
    old_logprobs,
    advantages,
    live,
    tokens,
    low,
    high,
    dual_clip,
    ratios,
    share,
    counts,
    entries,
    length,
    grad,
    parts,
    loss,
    statistics,
    ITEMS: tl.constexpr,
    DIFFER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the gradient of a tile, and its sums to ``parts`` or, without them, the results."""
    index = tile_of_tokens(TILE)
    inside = index < tokens
    counted = live_at(live, index, inside)
    log_ratio = _log_ratio(logprobs, old_logprobs, index, inside, counted)
    bounded = bounded_log_ratio(log_ratio)
    if ratios is None:
        ratio = exponential(bounded)
    else:
        ratio = tl.load(ratios + sequence_at(index, tokens, length), mask=inside, other=0.0)
    ratio = tl.where(counted, ratio, 0.0)
    advantage = load_kept(advantages, index, inside, counted)
    token_loss, slope, clipped = policy_token(log_ratio, ratio, advantage, low, high, dual_clip)
    share = token_share(share, counts, entries, tokens, length, index, inside, counted, ITEMS, DIFFER)
    if grad is not None:
        tl.store(grad + index, tl.where(counted, slope * share, 0.0), mask=inside)

    total = tl.sum(token_loss * share)
    outside = tl.sum(clipped.to(tl.float32))
    squared = tl.sum(bounded * bounded)
    peak = tl.max(ratio)
    count, near, off, deviation = tile_moments(ratio, counted)
    if parts is None:
        _finish(total, outside, squared, peak, count, near + off, deviation, loss, statistics)
    else:
        tile, tiles = tl.program_id(0), tl.num_programs(0)
        tl.store(parts + tile, total)
        tl.store(parts + tiles + tile, outside)
        tl.store(parts + 2 * tiles + tile, squared)
        tl.store(parts + 3 * tiles + tile, peak)
        tl.store(parts + 4 * tiles + tile, count)
        tl.store(parts + 5 * tiles + tile, near)
        tl.store(parts + 6 * tiles + tile, off)
        tl.store(parts + 7 * tiles + tile, deviation)


@triton.jit
def _finish(total, outside, squared, peak, count, mean, deviation, loss, statistics):
    divisor = tl.maximum(count, 1.0)
    tl.store(loss, total.to(tl.float32))
    tl.store(statistics, (outside / divisor).to(tl.float32))
    tl.store(statistics + 1, (0.5 * squared / divisor).to(tl.float32))
    tl.store(statistics + 2, mean.to(tl.float32))
    # a NaN, which the largest may have passed over, is in the mean
    tl.store(statistics + 3, tl.where(mean == mean, peak, mean).to(tl.float32))
    tl.store(statistics + 4, (deviation / divisor).to(tl.float32))


@triton.jit
def _add(parts, tiles, loss, statistics):
    total = tl.zeros((), tl.float64)
    outside = tl.zeros((), tl.float64)
    squared = tl.zeros((), tl.float64)
    peak = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    deviation = tl.zeros((), tl.float64)
    for start in range(0, tiles, PARTS):
        tile = start + tl.arange(0, PARTS)
        total += tl.sum(load_part(parts, 0, tiles, tile))
        outside += tl.sum(load_part(parts, 1, tiles, tile))
        squared += tl.sum(load_part(parts, 2, tiles, tile))
        peak = tl.maximum(peak, tl.max(load_part(parts, 3, tiles, tile)))
        counts = load_part(parts, 4, tiles, tile)
        means = load_part(parts, 5, tiles, tile) + load_part(parts, 6, tiles, tile)
        count, mean, deviation = merge_moments(count, mean, deviation, counts, means, load_part(parts, 7, tiles, tile))
    _finish(total, outside, squared, peak, count, mean, deviation, loss, statistics)


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
    num_items: float,
    loss: Tensor,
    statistics: Tensor,
    grad: Tensor | None,
    threads: int,
) -> None:
    device = logprobs.device
    shares = Shares(sequences, length, live, aggregation, num_items, device)
    tiles = shares.tiles
    ratios = torch.empty(sequences, dtype=torch.float32, device=device) if sequence_level else None
    if ratios is not None and sequences > 0:
        _sequence_ratio[(sequences,)](
            logprobs, old_logprobs, live, ratios, length, TILE=tile_of(length), num_warps=4, **FUSED
        )
    parts = torch.empty((8, tiles), dtype=torch.float32, device=device) if tiles > 1 else None
    _evaluate[(tiles,)](
        logprobs,
        old_logprobs,
        advantages,
        live,
        sequences * length,
        1 - clip_low,
        1 + clip_high,
        dual_clip,
        ratios,
        shares.share,
        shares.counts,
        shares.entries,
        max(length, 1),
        grad,
        parts,
        loss,
        statistics,
        ITEMS=shares.items,
        DIFFER=shares.differ,
        TILE=TILE,
        num_warps=WARPS,
        **FUSED,
    )
    if parts is not None:
        _add[(1,)](parts, tiles, loss, statistics, num_warps=4, **FUSED)
