"""Two rows of logits side by side, x of the policy and y of the reference: KL(policy || reference) in a second sweep,
with the formulas of csrc/cpu/pairs.h, over the columns other than the target.

normalisers (5, count): shift, scale, ref_shift, ref_scale, offset, where p_j = e^((x_j - shift) / temperature) * scale,
r_j the same of the reference, and offset = log(ref_scale / scale), exact where both scales are next to 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED, k3
from .numbers import LOG2E
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
    store_rows,
    thread_sum,
    vector,
)


@triton.jit
def kl_terms(p, ratio, r):
    """p log(p / r) - p + r, with ratio = log(r / p). Where it is next to 0 the three cancel, so they are joined."""
    ratio = tl.where(p == 0.0, 2.0, ratio)  # p has no log: r alone is left
    return tl.where(ratio <= 1.0, p * k3(ratio), r - p - p * ratio)


@triton.jit
def store_normalisers(normalisers, row, count, alive, shift, scale, ref_shift, ref_scale, offset):
    store_rows(normalisers, row, count, alive, shift)
    store_rows(normalisers + count, row, count, alive, scale)
    store_rows(normalisers + 2 * count.to(tl.int64), row, count, alive, ref_shift)
    store_rows(normalisers + 3 * count.to(tl.int64), row, count, alive, ref_scale)
    store_rows(normalisers + 4 * count.to(tl.int64), row, count, alive, offset)


@triton.jit
def block_terms(
    data, ref_data, at, columns, vocab, target, rate, softcap, normaliser, CAPPED: tl.constexpr, PLAIN: tl.constexpr
):
    shift, scale, ref_shift, ref_scale, offset = normaliser
    gap = load_block(data, at, columns, vocab, target, softcap, CAPPED, PLAIN) - shift
    ref_gap = load_block(ref_data, at, columns, vocab, target, softcap, CAPPED, PLAIN) - ref_shift
    # the gaps meet before the temperature rounds them, so that equal rows give exactly 0
    ratio = (ref_gap - gap) * (rate / LOG2E) + offset
    return thread_sum(kl_terms(tl.exp2(gap * rate) * scale, ratio, tl.exp2(ref_gap * rate) * ref_scale))


@triton.jit(do_not_specialize=GENERAL)
def sum_terms(
    vocab, targets, live, temperature, temperature_stride, softcap, logits, stride, ref_logits, ref_stride,
    normalisers, terms, count, VECTOR: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """terms (segments, count): the KL's terms over every segment of every live row."""
    row, segment = row_and_segment(vocab)
    if live is not None:
        if tl.load(live + row) == 0:
            return
    target = row_target(targets, row, vocab)
    rate = LOG2E / tl.load(temperature + row * temperature_stride)
    field = count.to(tl.int64)
    of_row = normalisers + row
    normaliser = (
        tl.load(of_row),
        tl.load(of_row + field),
        tl.load(of_row + 2 * field),
        tl.load(of_row + 3 * field),
        tl.load(of_row + 4 * field),
    )
    data = logits + tl.multiple_of(row * stride, VECTOR)
    ref_data = ref_logits + tl.multiple_of(row * ref_stride, VECTOR)
    columns = block_columns(VECTOR)
    total = tl.zeros((LANES,), tl.float32)
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, vocab)
    for at in range(start, stop, BLOCK):
        if is_plain(at, vocab, target):
            total += block_terms(data, ref_data, at, columns, vocab, target, rate, softcap, normaliser, CAPPED, True)
        else:
            total += block_terms(data, ref_data, at, columns, vocab, target, rate, softcap, normaliser, CAPPED, False)
    tl.store(terms + segment * field + row, tl.sum(total, axis=0))


def kl_parts(rows: Rows, logits: Logits, ref_logits: Logits, normalisers: Tensor) -> Tensor:
    """The KL's terms over every segment of the live rows, (segments, count)."""
    segments = segments_of(rows)
    terms = torch.empty(segments, rows.length, dtype=torch.float32, device=normalisers.device)
    sum_terms[(rows.length * segments,)](
        *rows[1:], logits.data, logits.row_stride, ref_logits.data, ref_logits.row_stride, normalisers, terms,
        rows.length, VECTOR=vector(logits, ref_logits), CAPPED=rows.softcap != 0, num_warps=WARPS, **FUSED,
    )  # fmt: skip
    return terms


@triton.jit
def join_terms(row, alive, terms, count, segments):
    """-> the sum of each row, in the segments' order."""
    total = tl.zeros((ROWS,), tl.float32)
    term = terms + row
    for _ in range(segments):
        total += tl.load(term, mask=alive, other=0.0)
        term += count
    return total


def empty_normalisers(rows: Rows, device: torch.device) -> Tensor:
    return torch.empty(5, rows.length, dtype=torch.float32, device=device)
