"""Shared by the ops with one number per token: masks, the divisor of a loss, and sums over tokens.

A program takes a tile of TILE tokens. A sum over several tiles takes two steps. Each program writes its partial sum to
a scratch table, with one row per sum and one column per tile. Then a single program adds these "parts" in the order of
the tiles, so that the result is the same on every run. Sums are float32 within a tile and float64 over tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel, launch
from .records import AGGREGATIONS, LossDivisor
from .ticket import ticket_of

TILE = 1024
# 4 tokens per thread: one 16-byte load of floats and one 4-byte load of the mask.
WARPS = 8
SPAN = 4 * TILE  # tokens of a program that counts live tokens
PARTS = tl.constexpr(1024)  # parts per load of the program that adds them


@triton.jit
def tile_of_tokens(TILE: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)


@triton.jit
def live_at(live, index, inside):
    """Which tokens count: inside the tensor and, with a mask, marked by it."""
    if live is not None:
        inside = inside & (tl.load(live + index, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_kept(data, index, inside, counted):
    """The tokens' numbers, 0 where a token does not count.

    The load includes masked tokens: with ``counted`` as its mask it would be one load per token, not a vector load.
    """
    return tl.where(counted, tl.load(data + index, mask=inside, other=0.0), 0.0)


@triton.jit
def store_part(parts, row, value):
    tl.store(parts + row * tl.num_programs(0) + tl.program_id(0), value)


@triton.jit
def load_part(parts, row, tiles, tile):
    """The parts of some tiles, as float64. ".cg" bypasses the L1 cache, where other programs' stores do not show."""
    part = tl.load(parts + row * tiles + tile, mask=tile < tiles, other=0.0, cache_modifier=".cg")
    return part.to(tl.float64)


@triton.jit
def is_last(ticket):
    """Whether this program is the last of the launch to call this. If so, it sees the stores of all other programs.

    Which program is last differs from run to run, so it decides only which program adds the parts, never a result.
    """
    # 1. Barrier: all threads of the program have stored their parts before the atomic.
    tl.debug_barrier()
    # 2. acq_rel makes this program's stores visible to the last program, and the others' stores to this one.
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    # 3. Reset for the next launch, which saves a memset.
    if last:
        tl.store(ticket, 0)
    return last


# ---- moments: count, mean and sum of squared deviations from the mean ------------------------------------------------


@triton.jit
def tile_moments(x, counted):
    """(count, near, off, deviation) of a tile; the mean is near + off. ``x`` is 0 where a token does not count."""
    # 1. The mean, rounded to float32.
    count = tl.sum(counted.to(tl.float32))
    divisor = tl.maximum(count, 1.0)
    near = tl.sum(x) / divisor
    # 2. Sums of deviations from ``near``, because a sum of squares of x would cancel. The mean of the deviations is the
    #    rounding error of ``near``.
    deviations = tl.where(counted, x - near, 0.0)
    off = tl.sum(deviations) / divisor
    deviation = tl.sum(deviations * deviations) - count * off * off
    return count, near, off, tl.where(deviation < 0.0, 0.0, deviation)


@triton.jit
def merge_moments(count, mean, deviation, counts, means, deviations):
    """Merges the moments with those of further parts (a vector of each), in float64."""
    total = count + tl.sum(counts)
    merged = (count * mean + tl.sum(counts * means)) / tl.maximum(total, 1.0)
    step = mean - merged
    steps = means - merged
    return total, merged, deviation + count * step * step + tl.sum(deviations + counts * steps * steps)


# ---- the divisors of rlhf_fast/ops/_aggregate.py ---------------------------------------------------------------------


@kernel(general=("counts", "items", "tokens", "span", "ticket"))
def _count_live(live, counts, items, tokens, span, ticket, BY_TOKEN: tl.constexpr, TILE: tl.constexpr):
    """The number of live tokens of each span, one span per program. If ``items`` is wanted, the last program counts the
    live tokens of all spans or, without BY_TOKEN, the spans with a live token.
    """
    first = tl.program_id(0).to(tl.int64) * span
    count = tl.zeros((), tl.int64)
    for start in range(0, span, TILE):
        offset = start + tl.arange(0, TILE)
        inside = (offset < span) & (first + offset < tokens)
        count += tl.sum(live_at(live, first + offset, inside).to(tl.int32))
    tl.store(counts + tl.program_id(0), count)
    if items is not None:
        if is_last(ticket):
            found = tl.zeros((), tl.int64)
            spans = tl.num_programs(0)
            for start in range(0, spans, PARTS):
                place = start + tl.arange(0, PARTS)
                part = tl.load(counts + place, mask=place < spans, other=0, cache_modifier=".cg")
                if not BY_TOKEN:
                    part = (part > 0).to(tl.int64)
                found += tl.sum(part)
            tl.store(items, found.to(tl.float64))


@triton.jit
def token_share(items, norm, lengths, index, tokens, length, inside):
    """The weight of each token, 1 / divisor. Divisor has ``items``, ``norm`` and ``lengths``."""
    share = 1.0 / norm
    if items is not None:
        count = tl.load(items).to(tl.float32)
        share = 1.0 / (tl.where(count > 0.0, count, 1.0) * norm)
    if lengths is not None:
        live_tokens = tl.load(lengths + sequence_at(index, tokens, length), mask=inside, other=1)
        share = share / tl.maximum(live_tokens.to(tl.float32), 1.0)
    return share


@triton.jit
def sequence_at(index, tokens, length):
    """The sequence of each token. Divides in 32 bits if the number of tokens fits, which is several times faster."""
    return index.to((tokens + length).dtype) // length


@triton.jit
def reciprocal(x):
    """1 / x in float64, accurate except in the last digits: a float32 reciprocal and one Newton step.

    A float64 division would be a function call, which spills registers to the stack.
    """
    near = (1.0 / x.to(tl.float32)).to(tl.float64)
    return near * (2.0 - x * near)


class Divisor:
    """The divisor of a loss over (sequences, length) tokens: ``norm``, times the number in the tensor ``items``, times
    the live tokens of the token's sequence in ``lengths``, where these are not None. One launch counts both.
    """

    def __init__(
        self, sequences: int, length: int, live: Tensor | None, given: LossDivisor, device: torch.device
    ) -> None:
        aggregation, tokens = AGGREGATIONS[given.aggregation], sequences * length
        by_token, by_length = aggregation == "token-mean", aggregation == "seq-mean-token-mean"
        masked = live is not None and sequences > 0
        normed = aggregation == "seq-mean-token-sum-norm" or (by_length and not masked)
        self.norm = float(max(length, 1)) if normed else 1.0
        self.items, self.lengths = given.items, None
        counts_items = given.items is None and given.number < 0 and masked
        if given.items is None and given.number > 0:
            self.norm *= given.number
        elif given.items is None and given.number < 0 and not masked:
            self.norm *= max(tokens if by_token else sequences, 1)
        if not counts_items and not (by_length and masked):
            return
        span = SPAN if by_token else length
        spans = max(triton.cdiv(tokens, SPAN), 1) if by_token else sequences
        counts = torch.empty(spans, dtype=torch.int64, device=device)
        if counts_items:
            self.items = torch.empty((), dtype=torch.float64, device=device)
        launch(
            _count_live,
            (spans,),
            live=live,
            counts=counts,
            items=self.items if counts_items else None,
            tokens=tokens,
            span=span,
            ticket=ticket_of(device),
            BY_TOKEN=by_token,
            TILE=tile_of(span),
        )
        if by_length:
            self.lengths = counts


def tile_of(length: int) -> int:
    """The tile size of a program that loops over a whole sequence."""
    return min(max(triton.next_power_of_2(length), 128), TILE)
