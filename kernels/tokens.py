"""Ops of a number a token: which tokens count, what a loss is divided by, and sums over them.

A program takes a tile of TILE tokens. Where a sum goes over several tiles, each writes its part to a scratch of one row
a sum and one column a tile, and one last program adds the parts in the tiles' order: the result is the same every time.
Sums are float32 within a tile and float64 over tiles.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED
from .records import AGGREGATIONS, LossDivisor

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
def store_part(parts, row, value):
    tl.store(parts + row * tl.num_programs(0) + tl.program_id(0), value)


@triton.jit
def load_part(parts, row, tiles, tile):
    # past the first-level cache, which knows nothing of what other programs stored
    part = tl.load(parts + row * tiles + tile, mask=tile < tiles, other=0.0, cache_modifier=".cg")
    return part.to(tl.float64)


@triton.jit
def is_last(ticket):
    """Whether this program is the launch's last to come here; it sees what all others stored before they did.

    Who is last changes from run to run, so that nothing but the place of a sum may depend on it.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last


def ticket_of(device: torch.device) -> Tensor:
    """The counter of ``is_last``, 0 before and after a launch.

    A stream has one, since its launches follow one another. A captured graph, which may run on any, has its own.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    return _ticket(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _ticket(device: torch.device, stream: int) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=device)


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


# ---- the divisors of rlhf_fast/ops/_aggregate.py ---------------------------------------------------------------------


@triton.jit
def _count_live(live, lengths, length, TILE: tl.constexpr):
    """The live tokens of a sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    count = tl.zeros((), tl.int64)
    for start in range(0, length, TILE):
        offset = start + tl.arange(0, TILE)
        count += tl.sum(live_at(live, sequence * length + offset, offset < length).to(tl.int32))
    tl.store(lengths + sequence, count)


@triton.jit
def token_weight(lengths, index, tokens, length, inside, DIFFER: tl.constexpr):
    """What a token counts before the divisor: 1 or, with DIFFER, 1 / the live tokens of its sequence."""
    weight = 1.0
    if DIFFER:
        live_tokens = tl.load(lengths + sequence_at(index, tokens, length), mask=inside, other=1)
        weight = 1.0 / tl.maximum(live_tokens.to(tl.float32), 1.0)
    return weight


@triton.jit
def sequence_at(index, tokens, length):
    """The sequence of each token of a tile, divided in 32 bits unless there are more tokens than they count."""
    return index.to((tokens + length).dtype) // length


@triton.jit
def loss_scale(lengths, sequences, items, norm, count, ITEMS: tl.constexpr):
    """1 / divisor, by the ``count`` of all live tokens; float64."""
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
    """1 / x of a float64 to all but its last digits; a division proper is a call, for which registers go on a stack."""
    near = (1.0 / x.to(tl.float32)).to(tl.float64)
    return near * (2.0 - x * near)


class Divisor:
    """What a loss of (sequences, length) is divided by: ``norm`` times what ITEMS names.

    ITEMS is "tokens" or "sequences" for their live number, "given" for what is at the address ``items``, or None.
    ``lengths``, the live tokens of each sequence, are counted where that takes them.
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
                _count_live[(sequences,)](live, self.lengths, length, TILE=tile_of(length), num_warps=4, **FUSED)


def tile_of(length: int) -> int:
    """For a program that goes through a whole sequence."""
    return min(max(triton.next_power_of_2(length), 128), TILE)
