"""Loads and stores of the kernels on rows of logits. A row is one token, a column one vocabulary entry.

There are two kinds of kernels:

- A sweep reads the logits. A program takes one SEGMENT of one row and reads it in blocks of BLOCK columns.
- A kernel per row reads and writes a few scalars of each row, such as its log-sum-exp. A program takes ROWS rows, one
  per lane (thread).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .numbers import tanh
from .records import NO_INDEX, Logits, RowOutputs, Rows

# Columns of a program in a sweep: enough to amortise its launch, and few enough that 16 rows of a large vocabulary fill
# the 132 multiprocessors of an H100.
SEGMENT: tl.constexpr = tl.constexpr(8192)
# Columns of a program's load: 16 per thread, 32 bytes of a 16-bit type or 64 bytes of float32.
BLOCK: tl.constexpr = tl.constexpr(2048)
THREADS: tl.constexpr = tl.constexpr(128)
WARPS = THREADS.value // 32
# Rows of a program in a kernel per row.
ROWS: tl.constexpr = tl.constexpr(128)

# Arguments of any number and address: another number of rows does not compile a kernel again.
GENERAL = (
    "length vocab targets live temperature temperature_stride softcap logits_stride ref_stride grad_stride columns "
    "segments parts ref_parts terms normalisers slopes statistics logprobs ref_logprobs entropy kl grad_logprobs "
    "grad_entropy grad_kl logsumexp extras grad_logsumexp old_logprobs advantages share"
).split()


class Row(NamedTuple):
    """One row of logits inside a kernel."""

    data: tl.tensor  # pointer to its first column
    vocab: tl.tensor
    target: tl.tensor  # -1 = none in the vocabulary
    softcap: tl.tensor | None  # None = none


class Lanes(NamedTuple):
    """The rows of a program in a kernel per row: (ROWS,), one per lane."""

    row: tl.tensor
    alive: tl.tensor  # row < length, and the row is live
    length: tl.tensor  # rows of the launch


def by_batch(launcher: Callable[[Any], None]) -> Callable[[Any], None]:
    """Decorator of a launcher on rows: its kernels know neither batches of rows nor ``ignore_index``.

    Each batch of rows gets launches of its own.
    """

    @functools.wraps(launcher)
    def run(a: Any) -> None:
        rows, data = a.rows, a.logits.data
        if rows.ignore_index != NO_INDEX:
            others = rows.targets != rows.ignore_index
            live = others if rows.live is None else rows.live & others
            a = a._replace(rows=rows._replace(live=live, ignore_index=NO_INDEX))
        if data.dim() == 2:
            return launcher(a)
        for batch in range(data.shape[0]):
            launcher(_batch_of(a, batch))

    return run


def _batch_of(a: Any, batch: int) -> Any:
    """The record of one of the batches."""
    size = a.logits.batch_rows

    def part(value: Any) -> Any:
        if isinstance(value, Logits):
            return value if value.data is None else value._replace(data=value.data[batch])
        if isinstance(value, Rows):
            return value._replace(length=size, **{name: part(each) for name, each in _tensors(value).items()})
        if isinstance(value, RowOutputs):
            return RowOutputs(*map(part, value))
        return value[batch * size : (batch + 1) * size] if isinstance(value, Tensor) else value

    return type(a)(*map(part, a))


def _tensors(rows: Rows) -> dict[str, Tensor]:
    return {name: value for name, value in rows._asdict().items() if isinstance(value, Tensor)}


def row_arguments(rows: Rows) -> dict[str, Any]:
    """The kernel arguments that all kernels on rows share, by name.

    Without a softcap its argument is None, so that no code is compiled for it.
    """
    return {
        "length": rows.length,
        "vocab": rows.vocab,
        "targets": rows.targets,
        "live": rows.live,
        **temperature_arguments(rows),
        "softcap": rows.softcap or None,
    }


def temperature_arguments(rows: Rows) -> dict[str, Any]:
    """``temperature`` is a number if ``temperature_stride`` is None, else a tensor."""
    if rows.temperatures is None:
        return {"temperature": rows.temperature, "temperature_stride": None}
    return {"temperature": rows.temperatures, "temperature_stride": rows.temperature_stride}


def segments_of(rows: Rows) -> int:
    return triton.cdiv(rows.vocab, SEGMENT.value)


def grid_of_rows(rows: Rows) -> tuple[int]:
    """The grid of a kernel per row."""
    return (triton.cdiv(rows.length, ROWS.value),)


def vector(*logits: Logits) -> int:
    """Columns of a 16-byte load, or 1 if some row does not start at a multiple of 16 bytes."""
    given = [(each.data, each.row_stride) for each in logits if each.data is not None]
    aligned = all(data.data_ptr() % 16 == 0 and stride * data.element_size() % 16 == 0 for data, stride in given)
    return 16 // given[0][0].element_size() if aligned else 1


@triton.jit
def row_and_segment(columns):
    """The row and the segment of this program. Consecutive programs read consecutive segments."""
    segments = tl.cdiv(columns, SEGMENT).to(tl.uint32)
    # a 32-bit division takes far fewer instructions than a 64-bit one
    row = tl.program_id(0).to(tl.uint32) // segments
    return row.to(tl.int64), (tl.program_id(0) - row * segments).to(tl.int32)


# ---- a sweep: blocks of columns --------------------------------------------------------------------------------------


@triton.jit
def vector_starts(VECTOR: tl.constexpr):
    """(steps, THREADS, 1): the columns of a block at which a thread's vectors start."""
    STEPS: tl.constexpr = BLOCK // (THREADS * VECTOR)
    return tl.arange(0, STEPS)[:, None, None] * (THREADS * VECTOR) + tl.arange(0, THREADS)[None, :, None] * VECTOR


@triton.jit
def block_columns(VECTOR: tl.constexpr):
    """(steps, THREADS, VECTOR): the columns of a block. In every step a thread reads one vector.

    With this shape Triton emits one 16-byte load per step and thread, coalesced over the threads of a warp.
    """
    return vector_starts(VECTOR) + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def capped(x, softcap):
    if softcap is not None:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def cap_slope(x, softcap):
    """d capped / d logit, given the capped value ``x``; 0 at -inf, which marks the target and columns past the row."""
    slope = 1.0
    if softcap is not None:
        t = x / softcap
        slope = tl.where(x == -float("inf"), 0.0, 1.0 - t * t)
    return slope


@triton.jit
def row_target(targets, row, vocab):
    """The target of a row, or -1 if it is not in the vocabulary."""
    target = -1
    if targets is not None:
        given = tl.load(targets + row)
        target = tl.where((given >= 0) & (given < vocab), given, -1).to(tl.int32)
    return target


@triton.jit
def load_block(row, start, columns):
    """The block at ``start`` as float32, after the softcap. The target and the columns past the vocabulary are -inf.

    A vector that starts in the row is loaded as a whole, even if it extends past the row's end. That is safe: its 16
    bytes are aligned, so they lie in one page, and the next row does not start within them.
    """
    # A mask per vector, not per column, keeps the load 16 bytes wide. The excluded columns are replaced afterwards.
    # Comparisons are relative to the block: of start + columns they would take 64 bits, twice the instructions.
    size = row.vocab - start
    begins = vector_starts(columns.shape[2]) < size
    x = capped(tl.load(row.data + start + columns, mask=begins, other=0.0).to(tl.float32), row.softcap)
    other = (columns < size) & (columns != row.target - start)
    return tl.where(other, x, -float("inf"))


@triton.jit
def thread_sum(x):
    """(steps, THREADS, VECTOR) -> (THREADS,): each thread sums its own columns, so no shuffle or barrier is needed."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


# ---- a kernel per row ------------------------------------------------------------------------------------------------


@triton.jit
def lanes_of_program(length, live):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = row < length
    if live is not None:
        alive = alive & (tl.load(live + row, mask=alive, other=0) != 0)
    return Lanes(row, alive, length)


@triton.jit
def inverse_temperatures(lanes, temperature, temperature_stride):
    if temperature_stride is not None:
        temperature = tl.load(temperature + lanes.row * temperature_stride, mask=lanes.alive, other=1.0)
    return 1.0 / temperature


@triton.jit
def temperature_of_row(temperature, temperature_stride, row):
    if temperature_stride is not None:
        temperature = tl.load(temperature + row * temperature_stride)
    return temperature


@triton.jit
def target_logits(lanes, targets, vocab, logits, logits_stride, softcap):
    """The target's logit of each row, after the softcap. NaN if the target is not in the vocabulary."""
    target = tl.load(targets + lanes.row, mask=lanes.alive, other=0)
    inside = lanes.alive & (target >= 0) & (target < vocab)
    x = tl.load(logits + lanes.row * logits_stride + target, mask=inside, other=float("nan")).to(tl.float32)
    return capped(x, softcap)


@triton.jit
def load_rows(tensor, lanes, STRIDE: tl.constexpr = 1):
    """One number per row, 0 if the row is dead or ``tensor`` is None."""
    value = tl.zeros((ROWS,), tl.float32)
    if tensor is not None:
        value = tl.load(tensor + lanes.row * STRIDE, mask=lanes.alive, other=0.0)
    return value


@triton.jit
def store_rows(tensor, lanes, value, STRIDE: tl.constexpr = 1):
    """Writes one number per row, 0 if the row is dead. Does nothing if ``tensor`` is None."""
    if tensor is not None:
        tl.store(tensor + lanes.row * STRIDE, tl.where(lanes.alive, value, 0.0), mask=lanes.row < lanes.length)


@triton.jit
def field_of(table, FIELD: tl.constexpr, length):
    """Row FIELD of a scratch table (fields, length). The offset is computed in 64 bits; ``length`` may have 32."""
    return table + FIELD * length.to(tl.int64)
