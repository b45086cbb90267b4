"""Ops of a number a token: which tokens count, each one's share in a loss, and sums over them.

A program takes a tile of TILE tokens. Where a sum goes over several tiles, each writes its part to a scratch of one row
a sum and one column a tile, and one last program adds the parts in the tiles' order: the result is the same every time.
Sums are float32 within a tile and float64 over tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED

TILE = 1024
WARPS = 8  # 4 tokens a thread: its 16-byte loads lie side by side with its neighbours', as the bytes of a mask do
PARTS = tl.constexpr(1024)  # read at once by the program that adds them


@triton.jit
def tile_of_tokens(TILE: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)


@triton.jit
def live_at(live, index, inside):
    if live is not None:
        inside = inside & (tl.load(live + index, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_kept(data, index, inside, counted):
    """0 where a token does not count; selected after the load, so that the load stays a vector's."""
    return tl.where(counted, tl.load(data + index, mask=inside, other=0.0), 0.0)


@triton.jit
def load_part(parts, row, tiles, tile):
    return tl.load(parts + row * tiles + tile, mask=tile < tiles, other=0.0).to(tl.float64)


# ---- moments: (count, mean, sum of squared deviations from the mean) -------------------------------------------------


@triton.jit
def tile_moments(x, counted):
    """(count, near, off, deviation), mean = near + off: deviations from the rounded mean also tell how far off it is.

    ``x`` is 0 where it does not count.
    """
    count = tl.sum(counted.to(tl.float32))
    divisor = tl.maximum(count, 1.0)
    near = tl.sum(x) / divisor
    deviations = tl.where(counted, x - near, 0.0)
    off = tl.sum(deviations) / divisor
    deviation = tl.sum(deviations * deviations) - count * off * off
    return count, near, off, tl.where(deviation < 0.0, 0.0, deviation)


@triton.jit
def merge_moments(count, mean, deviation, counts, means, deviations):
    """With those of further parts, a vector of each; all float64."""
    total = count + tl.sum(counts)
    merged = (count * mean + tl.sum(counts * means)) / tl.maximum(total, 1.0)
    step = mean - merged
    steps = means - merged
    return total, merged, deviation + count * step * step + tl.sum(deviations + counts * steps * steps)


# ---- shares: the divisors of rlhf_fast/ops/_aggregate.py -------------------------------------------------------------


@triton.jit
def _count_live(live, counts, length, tokens, TILE: tl.constexpr):
    """counts[i] = live tokens of [i * length, (i + 1) * length)."""
    span = tl.program_id(0).to(tl.int64)
    count = tl.zeros((), tl.int64)
    end = tl.minimum((span + 1) * length, tokens)
    for start in range(span * length, end, TILE):
        index = start + tl.arange(0, TILE)
        count += tl.sum(live_at(live, index, index < end).to(tl.int32))
    tl.store(counts + span, count)


@triton.jit
def token_share(
    share, counts, entries, tokens, length, index, inside, counted, ITEMS: tl.constexpr, DIFFER: tl.constexpr
):
    """The share of each token of a tile in the loss.

    ``share`` is what the launcher knew of it. ITEMS "tokens" or "sequences" divides by their number: a count for each
    of ``entries`` or, without counts, those of this tile, which then is all there is. DIFFER divides by the live tokens
    of the token's own sequence.
    """
    if ITEMS is not None:
        if counts is None:
            items = tl.sum(counted.to(tl.float32))
        else:
            total = tl.zeros((), tl.int64)
            for start in range(0, entries, PARTS):
                entry = start + tl.arange(0, PARTS)
                found = tl.load(counts + entry, mask=entry < entries, other=0)
                if ITEMS == "sequences":
                    found = (found > 0).to(tl.int64)
                total += tl.sum(found)
            items = total.to(tl.float32)
        share = share / tl.maximum(items, 1.0)
    if DIFFER:
        lengths = tl.load(counts + sequence_at(index, tokens, length), mask=inside, other=1)
        share = share / tl.maximum(lengths.to(tl.float32), 1.0)
    return share


@triton.jit
def sequence_at(index, tokens, length):
    """The sequence of each token of a tile, divided in 32 bits unless there are more tokens than they count."""
    return index.to((tokens + length).dtype) // length


class Shares:
    """``share``, ``counts``, ``entries``, ITEMS and DIFFER of ``token_share``, for a loss of (sequences, length)."""

    def __init__(
        self, sequences: int, length: int, live: Tensor | None, aggregation: int, num_items: float, device: torch.device
    ) -> None:
        by_token, by_length, normed = aggregation == 0, aggregation == 2, aggregation == 3
        tokens = sequences * length
        self.tiles = max(triton.cdiv(tokens, TILE), 1)
        self.differ = by_length and live is not None
        self.items = None if live is None or num_items >= 0 else "tokens" if by_token else "sequences"
        if live is None and num_items < 0:
            num_items = tokens if by_token else sequences
        known = num_items if self.items is None and num_items > 0 else 1.0
        self.share = 1 / (known * (max(length, 1) if normed or by_length and live is None else 1))

        self.counts: Tensor | None = None
        self.entries = 0
        if self.differ or self.items == "sequences" or self.items == "tokens" and self.tiles > 1:
            # every tile adds up the counts, so tokens are counted in a limited number of spans
            span = triton.cdiv(self.tiles, PARTS.value) * TILE if by_token else length
            self.entries = triton.cdiv(tokens, span) if by_token else sequences
            self.counts = torch.empty(self.entries, dtype=torch.int64, device=device)
            if self.entries:
                _count_live[(self.entries,)](live, self.counts, span, tokens, TILE=tile_of(span), num_warps=4, **FUSED)


def tile_of(length: int) -> int:
    """For a program that goes through a whole sequence."""
    return min(max(triton.next_power_of_2(length), 128), TILE)
