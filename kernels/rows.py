"""Rows of logits on a GPU: how their columns are read by programs, and how per-row numbers are read by lanes."""

import triton
import triton.language as tl

from .numbers import tanh
from .records import Logits, Rows

# Columns that a program sums: long enough to pay for its start, short enough to spread 16 rows over 132 processors.
SEGMENT: tl.constexpr = tl.constexpr(8192)
# Columns that it reads at a time, by LANES threads: 32 bytes a thread of a half type, 64 of float32.
BLOCK: tl.constexpr = tl.constexpr(2048)
LANES: tl.constexpr = tl.constexpr(128)
WARPS = LANES.value // 32
# Rows a program of the kernels that take one row a lane.
ROWS: tl.constexpr = tl.constexpr(128)

# Arguments for whose values no kernel is compiled anew.
GENERAL = (
    "count vocab targets live temperature temperature_stride softcap stride ref_stride grad_stride columns segments "
    "parts ref_parts terms normalisers slopes statistics logprobs ref_logprobs entropy kl grad_logprobs grad_entropy "
    "grad_kl old_logprobs advantages share"
).split()


def segments_of(rows: Rows) -> int:
    return triton.cdiv(rows.vocab, SEGMENT.value)


def lanes_of(rows: Rows) -> tuple[int]:
    """The grid of a kernel that takes one row a lane."""
    return (triton.cdiv(rows.length, ROWS.value),)


def vector(*logits: Logits) -> int:
    """Columns in a load of 16 bytes, or 1 where one of them has rows that begin elsewhere."""
    given = [(each.data, each.row_stride) for each in logits if each.data is not None]
    aligned = all(data.data_ptr() % 16 == 0 and stride * data.element_size() % 16 == 0 for data, stride in given)
    return 16 // given[0][0].element_size() if aligned else 1


@triton.jit
def row_and_segment(columns):
    """Of this program. Programs side by side read memory side by side."""
    segments = tl.cdiv(columns, SEGMENT).to(tl.uint32)
    row = tl.program_id(0).to(tl.uint32) // segments
    return row.to(tl.int64), (tl.program_id(0) - row * segments).to(tl.int32)


# ---- a block of columns ----------------------------------------------------------------------------------------------


@triton.jit
def vector_starts(VECTOR: tl.constexpr):
    """(steps, LANES, 1) columns of a block that a vector begins at."""
    STEPS: tl.constexpr = BLOCK // (LANES * VECTOR)
    return tl.arange(0, STEPS)[:, None, None] * (LANES * VECTOR) + tl.arange(0, LANES)[None, :, None] * VECTOR


@triton.jit
def block_columns(VECTOR: tl.constexpr):
    """(steps, LANES, VECTOR) columns of a block: in every step a thread has VECTOR of them, side by side."""
    return vector_starts(VECTOR) + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def capped(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def cap_slope(x, softcap, CAPPED: tl.constexpr):
    """Of the cap, where it gave ``x``; a -inf that stands for no column has none."""
    slope = 1.0
    if CAPPED:
        t = x / softcap
        slope = tl.where(x == -float("inf"), 0.0, 1.0 - t * t)
    return slope


@triton.jit
def row_target(targets, row, vocab):
    """-1 where the row has none in the vocabulary."""
    target = -1
    if targets is not None:
        given = tl.load(targets + row)
        target = tl.where((given >= 0) & (given < vocab), given, -1).to(tl.int32)
    return target


@triton.jit
def is_plain(start, vocab, target):
    """Whether the block from ``start`` on lies in the vocabulary and does not hold the target: most do, and need no
    comparison a column.
    """
    return (start + BLOCK <= vocab) & ((target < start) | (target >= start + BLOCK))


@triton.jit
def load_block(row, start, columns, vocab, target, softcap, CAPPED: tl.constexpr, PLAIN: tl.constexpr):
    """The block from ``start`` on as floats, after the softcap. The target's column (none: -1) reads as -inf, and so
    does whatever lies past the vocabulary, unless the block is PLAIN. A vector that begins in the row is read whole:
    it ends before the next row begins, and 16 aligned bytes lie in one piece of memory.
    """
    if PLAIN:
        x = capped(tl.load(row + start + columns).to(tl.float32), softcap, CAPPED)
    else:
        begins = start + vector_starts(columns.shape[2]) < vocab
        x = capped(tl.load(row + start + columns, mask=begins, other=0.0).to(tl.float32), softcap, CAPPED)
        other = (start + columns < vocab) & (start + columns != target)
        x = tl.where(other, x, -float("inf"))
    return x


@triton.jit
def thread_sum(x):
    """(steps, LANES, VECTOR) -> (LANES,), each thread its own."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


# ---- a row a lane ----------------------------------------------------------------------------------------------------


@triton.jit
def lane_rows(count, live):
    """The rows of this program, and which of them are there and live."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = row < count
    if live is not None:
        alive = alive & (tl.load(live + row, mask=alive, other=0) != 0)
    return row, alive


@triton.jit
def inverse_temperatures(row, alive, temperature, temperature_stride):
    return 1.0 / tl.load(temperature + row * temperature_stride, mask=alive, other=1.0)


@triton.jit
def target_logits(row, alive, targets, vocab, logits, stride, softcap, CAPPED: tl.constexpr):
    """After the softcap; NaN where the target is out of range."""
    target = tl.load(targets + row, mask=alive, other=0)
    inside = alive & (target >= 0) & (target < vocab)
    x = tl.load(logits + row * stride + target, mask=inside, other=float("nan")).to(tl.float32)
    return capped(x, softcap, CAPPED)


@triton.jit
def load_rows(tensor, row, alive):
    """0 where dead, or where there is no tensor."""
    value = tl.zeros((ROWS,), tl.float32)
    if tensor is not None:
        value = tl.load(tensor + row, mask=alive, other=0.0)
    return value


@triton.jit
def store_rows(to, row, count, alive, value):
    """0 where dead."""
    if to is not None:
        tl.store(to + row, tl.where(alive, value, 0.0), mask=row < count)
