"""Shared by the ops with one number per token: masks, the divisor of a loss, and sums over tokens.

A program takes a tile of TILE tokens. A sum over several tiles takes two steps. Each program writes its partial sum to
a scratch table, with one row per sum and one column per tile. Then a single program adds these "parts" in the order of
the tiles, so that the result is the same on every run. Sums are float32 within a tile and float64 over tiles.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel, launch
from .records import AGGREGATIONS, LossDivisor

TILE = 1024
# 4 tokens per thread: one 16-byte load of floats and one 4-byte load of the mask.
WARPS = 8
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


def ticket_of(device: torch.device) -> Tensor:
    """The counter of ``is_last``, 0 before and after each launch.

    There is one counter per stream, because launches on a stream do not overlap. A captured graph may run on any
    stream, so it gets its own counter.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    return _ticket(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _ticket(device: torch.device, stream: int) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=device)


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


@kernel(general=("lengths",))
def _count_live(live, lengths, length, TILE: tl.constexpr):
    """The number of live tokens of each sequence, one sequence per program."""
    sequence = tl.program_id(0).to(tl.int64)
    count = tl.zeros((), tl.int64)
    for start in range(0, length, TILE):
        offset = start + tl.arange(0, TILE)
        count += tl.sum(live_at(live, sequence * length + offset, offset < length).to(tl.int32))
    tl.store(lengths + sequence, count)


@triton.jit
def token_weight(lengths, index, tokens, length, inside, DIFFER: tl.constexpr):
    """The weight of a token before the division by the divisor: 1 or, with DIFFER, 1 / live tokens of its sequence."""
    weight = 1.0
    if DIFFER:
        live_tokens = tl.load(lengths + sequence_at(index, tokens, length), mask=inside, other=1)
        weight = 1.0 / tl.maximum(live_tokens.to(tl.float32), 1.0)
    return weight


@triton.jit
def sequence_at(index, tokens, length):
    """The sequence of each token. Divides in 32 bits if the number of tokens fits, which is several times faster."""
    return index.to((tokens + length).dtype) // length


@triton.jit
def loss_scale(lengths, sequences, items, norm, count, ITEMS: tl.constexpr):
    """1 / divisor in float64. ``count`` is the number of live tokens; Divisor has the other arguments."""
    if ITEMS == "tokens":
        found = count
    elif ITEMS == "sequences":
        found = tl.zeros((), tl.float64)
        for start in range(0, sequences, PARTS):
            sequence = start + tl.arange(0, PARTS)
            live_tokens = tl.load(lengths + sequence, mask=sequence < sequences, other=0)
            found += tl.sum((live_tokens > 0).to(tl.float64))
    elif ITEMS == "given":
        found = tl.load(items).to(tl.float64)
    else:
        found = tl.full((), 1.0, tl.float64)
    return reciprocal(tl.where(found > 0.0, found, 1.0) * norm)


@triton.jit
def reciprocal(x):
    """1 / x in float64, accurate except in the last digits: a float32 reciprocal and one Newton step.

    A float64 division would be a function call, which spills registers to the stack.
    """
    near = (1.0 / x.to(tl.float32)).to(tl.float64)
    return near * (2.0 - x * near)


class Divisor:
    """The divisor of a loss over (sequences, length) tokens: ``norm`` times a number that ITEMS selects.

    ITEMS is "tokens" (the number of live tokens), "sequences" (the number of sequences with a live token), "given" (the
    number in the tensor ``items``) or None (1). ``lengths`` is the number of live tokens of each sequence, counted by a
    launch if the divisor needs it.
    """

    def __init__(
        self, sequences: int, length: int, live: Tensor | None, given: LossDivisor, device: torch.device
    ) -> None:
        aggregation = AGGREGATIONS[given.aggregation]
        by_length = aggregation == "seq-mean-token-mean"
        self.differ = by_length and live is not None
        normed = aggregation == "seq-mean-token-sum-norm" or (by_length and live is None)
        self.norm = float(max(length, 1)) if normed else 1.0
        self.items = given.items
        self.ITEMS: str | None = None
        if given.items is not None:
            self.ITEMS = "given"
        elif given.number >= 0:
            self.norm *= given.number or 1.0
        elif aggregation == "token-mean":
            self.ITEMS = "tokens"
        elif live is None:
            self.norm *= max(sequences, 1)
        else:
            self.ITEMS = "sequences"
        self.lengths: Tensor | None = None
        if self.differ or self.ITEMS == "sequences":
            self.lengths = torch.empty(sequences, dtype=torch.int64, device=device)
            if sequences:
                launch(
                    _count_live,
                    (sequences,),
                    live=live,
                    lengths=self.lengths,
                    length=length,
                    TILE=tile_of(length),
                )


def tile_of(length: int) -> int:
    """The tile size of a program that loops over a whole sequence."""
    return min(max(triton.next_power_of_2(length), 128), TILE)
