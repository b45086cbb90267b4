"""The sums of rows of logits in one sweep, and what they say of the target, with the formulas of csrc/cpu/rows.h.

A row is cut into segments, and a program sums one: a thousand rows and a single one of 151936 columns both fill the
chip. A small kernel then joins a row's segments in their order, one row a lane. So a row's result depends neither on
its place nor on the rows beside it.

The sums are over the columns other than the target, with gap = x - shift:

    shift      the largest
    tops       how many have it. Next to their 1, a float has no digits left for a tail of 1e-8
    rest       the sum of e^(gap / temperature) over the others
    weighted   the sum of e^(gap / temperature) * -gap
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED, exponential
from .numbers import FAR, LOG2E, at_most, log1p
from .records import Logits, Rows
from .rows import (
    BLOCK,
    GENERAL,
    LANES,
    ROWS,
    SEGMENT,
    WARPS,
    block_columns,
    is_plain,
    load_block,
    row_and_segment,
    row_target,
    segments_of,
    thread_sum,
    vector,
)


@triton.jit
def lowered(shift, tops, rest, weighted, to, rate):
    """The sums by another shift, ``to``, which is no smaller."""
    below = to > shift
    rise = tl.where(below & (shift > -float("inf")), to - shift, 0.0)
    shrink = tl.exp2(-rise * rate)
    total = tops + rest
    moved = tl.where(shrink == 0.0, 0.0, shrink * (weighted + rise * total))
    return tl.where(below, 0.0, tops), tl.where(below, shrink * total, rest), tl.where(below, moved, weighted)


@triton.jit
def add_block(x, shift, tops, rest, weighted, rate, WEIGHTED: tl.constexpr):
    """Sums (LANES,) of a thread each, and what a block adds to them."""
    raised = tl.maximum(shift, tl.max(tl.max(x, axis=2), axis=0))
    tops, rest, weighted = lowered(shift, tops, rest, weighted, raised, rate)
    gap = x - tl.where(raised == -float("inf"), 0.0, raised)[None, :, None]
    e = tl.exp2(gap * rate)
    others = thread_sum(tl.where(gap == 0.0, 0.0, e))
    tops += tl.floor(thread_sum(e) - others + 0.5)  # counted so, they take no selection of their own
    rest += others
    if WEIGHTED:
        weighted -= thread_sum(e * tl.maximum(gap, -3.0e38))  # -inf would make it NaN
    return raised, tops, rest, weighted


@triton.jit(do_not_specialize=GENERAL)
def sum_segments(
    vocab, targets, live, temperature, temperature_stride, softcap, logits, stride, parts, count,
    VECTOR: tl.constexpr, CAPPED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """parts (4, segments, count): shift, tops, rest, weighted of every segment of every live row."""
    row, segment = row_and_segment(vocab)
    if live is not None:
        if tl.load(live + row) == 0:
            return
    target = row_target(targets, row, vocab)
    rate = LOG2E / tl.load(temperature + row * temperature_stride)
    data = logits + tl.multiple_of(row * stride, VECTOR)
    columns = block_columns(VECTOR)
    shift = tl.full((LANES,), -float("inf"), tl.float32)
    tops = tl.zeros((LANES,), tl.float32)
    rest = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, vocab)
    for at in range(start, stop, BLOCK):
        if is_plain(at, vocab, target):
            x = load_block(data, at, columns, vocab, target, softcap, CAPPED, True)
            shift, tops, rest, weighted = add_block(x, shift, tops, rest, weighted, rate, WEIGHTED)
        else:
            x = load_block(data, at, columns, vocab, target, softcap, CAPPED, False)
            shift, tops, rest, weighted = add_block(x, shift, tops, rest, weighted, rate, WEIGHTED)
    largest = tl.max(shift, axis=0)
    tops, rest, weighted = lowered(shift, tops, rest, weighted, largest, rate)
    part = parts + segment.to(tl.int64) * count + row
    field = tl.num_programs(0).to(tl.int64)
    tl.store(part, largest)
    tl.store(part + field, tl.sum(tops, axis=0))
    tl.store(part + 2 * field, tl.sum(rest, axis=0))
    if WEIGHTED:
        tl.store(part + 3 * field, tl.sum(weighted, axis=0))


def sum_rows(rows: Rows, logits: Logits, weighted: bool) -> Tensor:
    """The sums of every segment of the live rows, (4, segments, count); ``weighted`` is what an entropy needs."""
    segments = segments_of(rows)
    parts = torch.empty(4, segments, rows.length, dtype=torch.float32, device=rows.temperature.device)
    sum_segments[(rows.length * segments,)](
        *rows[1:], logits.data, logits.row_stride, parts, rows.length, VECTOR=vector(logits), CAPPED=rows.softcap != 0,
        WEIGHTED=weighted, num_warps=WARPS, **FUSED,
    )  # fmt: skip
    return parts


@triton.jit
def join_segments(row, alive, parts, count, segments, inverse_temperature, WEIGHTED: tl.constexpr):
    """-> shift, tops, rest, weighted of each row."""
    rate = LOG2E * inverse_temperature
    shift = tl.full((ROWS,), -float("inf"), tl.float32)
    tops = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    field = segments.to(tl.int64) * count
    part = parts + row
    for _ in range(segments):
        other_shift = tl.load(part, mask=alive, other=0.0)
        other_tops = tl.load(part + field, mask=alive, other=1.0)
        other_rest = tl.load(part + 2 * field, mask=alive, other=0.0)
        other_weighted = tl.zeros((ROWS,), tl.float32)
        if WEIGHTED:
            other_weighted = tl.load(part + 3 * field, mask=alive, other=0.0)
        raised = tl.maximum(shift, other_shift)
        tops, rest, weighted = lowered(shift, tops, rest, weighted, raised, rate)
        other_tops, other_rest, other_weighted = lowered(
            other_shift, other_tops, other_rest, other_weighted, raised, rate
        )
        shift = raised
        tops += other_tops
        rest += other_rest
        weighted += other_weighted
        part += count
    return shift, tops, rest, weighted


@triton.jit
def finish_rows(shift, tops, rest, weighted, target_logit, inverse_temperature):
    """-> logprob, entropy (where the sums are weighted), and the statistics of csrc/rlhf_fast.h: shift, others_mass,
    scale, log_norm, the last without its bound.
    """
    alone = shift == -float("inf")
    empty = alone & (rest == 0.0)
    total = tl.where(empty, 1.0, tops + rest)
    log_total = tl.where(empty, 0.0, log1p(tops - 1.0 + rest))
    # log odds against the target
    d = (shift - target_logit) * inverse_temperature + log_total
    d = tl.where(target_logit == float("inf"), float("nan"), d)
    certainty = tl.abs(d)
    odds = exponential(-certainty)
    softplus = log1p(odds)
    likelier = 1.0 / (1.0 + odds)
    unlikelier = odds * likelier
    mass = tl.where(d > 0.0, likelier, unlikelier)
    split = unlikelier * at_most(certainty, FAR) + softplus
    spread = log_total + weighted * inverse_temperature / total
    logprob = -(tl.where(d > 0.0, d, 0.0) + softplus)
    log_norm = log_total + tl.where(d < 0.0, -d, 0.0) + softplus
    shift = tl.where(alone, 0.0, shift)
    return logprob, split + mass * spread, shift, mass, mass / total, log_norm
