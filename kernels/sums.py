"""The first sweep: the log-sum-exp of rows of logits (online softmax), and from it log-prob and entropy.

The formulas are those of csrc/cpu/rows.h. Each program reduces one segment of a row, so that a thousand rows and a
single row of 151936 columns both fill the GPU. A kernel per row then combines the segments of each row in order, so
the result of a row depends neither on its position nor on the other rows.

The sums are over all columns except the target, with gap = x - shift:

    shift      the maximum of x
    tops       the number of columns with x = shift
    rest       sum of e^(gap / temperature) over the columns with x < shift
    weighted   sum of e^(gap / temperature) * -gap, for the entropy

tops + rest is the usual sum of the softmax. They are kept apart because 1 + 1e-8 is 1 in float32: a row with one large
logit would lose the sum of all others.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import exponential
from .launch import kernel, launch
from .numbers import FAR, LOG2E, at_most, log1p
from .records import Logits, Rows
from .rows import (
    BLOCK,
    GENERAL,
    ROWS,
    SEGMENT,
    THREADS,
    WARPS,
    Row,
    block_columns,
    load_block,
    row_and_segment,
    row_arguments,
    row_target,
    segments_of,
    temperature_of_row,
    thread_sum,
    vector,
)


class RowSums(NamedTuple):
    """The four sums above, over a part of a row's columns."""

    shift: tl.tensor
    tops: tl.tensor
    rest: tl.tensor
    weighted: tl.tensor


class RowResult(NamedTuple):
    """The results of a row. The last four are the fields of RowStatistics in csrc/rlhf_fast.h."""

    logprob: tl.tensor
    entropy: tl.tensor
    shift: tl.tensor
    others_mass: tl.tensor  # 1 - p_target
    scale: tl.tensor  # p_j = e^((x_j - shift) / temperature) * scale
    log_norm: tl.tensor  # log p_j = (x_j - shift) / temperature - log_norm; not bounded by FAR


@triton.jit
def no_columns(SIZE: tl.constexpr):
    zero = tl.zeros((SIZE,), tl.float32)
    return RowSums(tl.full((SIZE,), -float("inf"), tl.float32), zero, zero, zero)


@triton.jit
def rescaled(sums, shift, rate):
    """The same sums relative to another ``shift`` >= sums.shift: the rescaling step of the online softmax."""
    below = shift > sums.shift
    # if no column was summed yet, sums.shift is -inf, and the difference would be inf - inf
    rise = tl.where(below & (sums.shift > -float("inf")), shift - sums.shift, 0.0)
    shrink = tl.exp2(-rise * rate)
    # The former maximum is below the new shift, so ``tops`` joins ``rest``. Every -gap grows by ``rise``.
    total = sums.tops + sums.rest
    moved = tl.where(shrink == 0.0, 0.0, shrink * (sums.weighted + rise * total))
    return RowSums(
        shift=shift,
        tops=tl.where(below, 0.0, sums.tops),
        rest=tl.where(below, shrink * total, sums.rest),
        weighted=tl.where(below, moved, sums.weighted),
    )


@triton.jit
def add_block(sums, x, rate):
    """Adds a block to the sums (THREADS,), each thread its own columns."""
    # 1. Update the running max first: then no exponential exceeds 1, and none overflows.
    sums = rescaled(sums, tl.maximum(sums.shift, tl.max(tl.max(x, axis=2), axis=0)), rate)
    # 2. The exponentials of the block, relative to the running max. (If all columns are -inf, subtract 0.)
    gap = x - tl.where(sums.shift == -float("inf"), 0.0, sums.shift)[None, :, None]
    e = tl.exp2(gap * rate)
    rest = thread_sum(tl.where(gap == 0.0, 0.0, e))
    # 3. Columns at the maximum have e = 1 exactly. Their number is the difference of the two sums, rounded, which saves
    #    a comparison and a selection per column.
    tops = tl.floor(thread_sum(e) - rest + 0.5)
    weighted = sums.weighted - thread_sum(e * tl.maximum(gap, -3.0e38))  # 0 * -inf would be NaN
    return RowSums(sums.shift, sums.tops + tops, sums.rest + rest, weighted)


@kernel(general=GENERAL)
def sum_segments(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, parts,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """parts (4, segments, length): the RowSums of each segment of each live row."""
    index, segment = row_and_segment(vocab)
    if live is not None:
        if tl.load(live + index) == 0:
            return
    target = row_target(targets, index, vocab)
    rate = LOG2E / temperature_of_row(temperature, temperature_stride, index)
    # multiple_of lets Triton emit vector loads: it cannot infer the alignment from a stride known only at run time.
    row = Row(logits + tl.multiple_of(index * logits_stride, VECTOR), vocab, target, softcap)
    columns = block_columns(VECTOR)

    # 1. Each thread keeps its own sums in registers, so the loop has no barrier.
    sums = no_columns(THREADS)
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, vocab)
    for at in range(start, stop, BLOCK):
        sums = add_block(sums, load_block(row, at, columns), rate)

    # 2. One reduction over the threads, after rescaling to their common maximum.
    largest = tl.max(sums.shift, axis=0)
    sums = rescaled(sums, largest, rate)
    part = parts + segment.to(tl.int64) * length + index
    field = tl.num_programs(0).to(tl.int64)  # segments * length
    tl.store(part, largest)
    tl.store(part + field, tl.sum(sums.tops, axis=0))
    tl.store(part + 2 * field, tl.sum(sums.rest, axis=0))
    tl.store(part + 3 * field, tl.sum(sums.weighted, axis=0))


def sum_rows(rows: Rows, logits: Logits) -> Tensor:
    """The sums of each segment of the live rows, (4, segments, length)."""
    assert logits.data is not None  # only a gradient may be None
    segments = segments_of(rows)
    parts = torch.empty(4, segments, rows.length, dtype=torch.float32, device=logits.data.device)
    launch(
        sum_segments,
        (rows.length * segments,),
        **row_arguments(rows),
        logits=logits.data,
        logits_stride=logits.row_stride,
        parts=parts,
        VECTOR=vector(logits),
        num_warps=WARPS,
    )
    return parts


@triton.jit
def join_segments(lanes, parts, segments, inverse_temperature):
    """Combines the sums of each row's segments, in order."""
    rate = LOG2E * inverse_temperature
    sums = no_columns(ROWS)
    field = segments.to(tl.int64) * lanes.length
    part = parts + lanes.row
    for _ in range(segments):
        other = RowSums(
            shift=tl.load(part, mask=lanes.alive, other=0.0),
            tops=tl.load(part + field, mask=lanes.alive, other=1.0),  # a dead row must not divide by 0
            rest=tl.load(part + 2 * field, mask=lanes.alive, other=0.0),
            weighted=tl.load(part + 3 * field, mask=lanes.alive, other=0.0),
        )
        largest = tl.maximum(sums.shift, other.shift)
        sums = rescaled(sums, largest, rate)
        other = rescaled(other, largest, rate)
        sums = RowSums(largest, sums.tops + other.tops, sums.rest + other.rest, sums.weighted + other.weighted)
        part += lanes.length
    return sums


@triton.jit
def finish_rows(sums, target_logit, inverse_temperature):
    """The RowResult of each row, by the formulas of rlhf_fast/ops/_vocab.py.

    With d the log odds against the target, log p_target = -softplus(d) and 1 - p_target = sigmoid(d). Neither subtracts
    nearly equal numbers, so a confident token keeps its relative precision.
    """
    # 1. The log-sum-exp of the other columns, relative to the shift; 0 if all of them are -inf.
    alone = sums.shift == -float("inf")
    empty = alone & (sums.rest == 0.0)
    total = tl.where(empty, 1.0, sums.tops + sums.rest)
    log_total = tl.where(empty, 0.0, log1p(sums.tops - 1.0 + sums.rest))
    # 2. The log odds. A target at +inf gives NaN, as in the torch reference.
    d = (sums.shift - target_logit) * inverse_temperature + log_total
    d = tl.where(target_logit == float("inf"), float("nan"), d)
    # 3. Probabilities and softplus from e^-|d| <= 1, which cannot overflow.
    certainty = tl.abs(d)
    odds = exponential(-certainty)
    softplus = log1p(odds)
    larger_mass = 1.0 / (1.0 + odds)  # max(p_target, 1 - p_target)
    smaller_mass = odds * larger_mass
    others_mass = tl.where(d > 0.0, larger_mass, smaller_mass)
    # 4. entropy = H(p_target, 1 - p_target) + others_mass * H(softmax over the other columns)
    binary_entropy = smaller_mass * at_most(certainty, FAR) + softplus
    others_entropy = log_total + sums.weighted * inverse_temperature / total
    return RowResult(
        logprob=-(tl.where(d > 0.0, d, 0.0) + softplus),
        entropy=binary_entropy + others_mass * others_entropy,
        shift=tl.where(alone, 0.0, sums.shift),
        others_mass=others_mass,
        scale=others_mass / total,
        log_norm=log_total + tl.where(d < 0.0, -d, 0.0) + softplus,
    )
