"""The second sweep, over two rows together, the policy's and the reference's: KL(policy || reference).

The formulas are those of csrc/cpu/pairs.h, over all columns except the target. Before the sweep, a kernel per row
writes the Normalisers of each pair of rows to a table (5, length).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import k3
from .launch import kernel, launch
from .numbers import LOG2E
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
    field_of,
    is_plain,
    load_block,
    row_and_segment,
    row_arguments,
    row_target,
    segments_of,
    store_rows,
    temperature_of_row,
    thread_sum,
    vector,
)


class Normalisers(NamedTuple):
    """p_j = e^((x_j - shift) / temperature) * scale, and r_j likewise from the reference's logits and fields."""

    shift: tl.tensor
    scale: tl.tensor
    ref_shift: tl.tensor
    ref_scale: tl.tensor
    offset: tl.tensor  # log(ref_scale / scale), computed so that it is accurate where both are close to 1


@triton.jit
def kl_terms(p, ratio, r):
    """p log(p / r) - p + r >= 0, with ratio = log(r / p).

    Near ratio = 0 the three terms cancel; p * (e^ratio - 1 - ratio), by k3, does not.
    """
    ratio = tl.where(p == 0.0, 2.0, ratio)  # log p is -inf: select the branch r - p - p * ratio, which gives r
    return tl.where(ratio <= 1.0, p * k3(ratio), r - p - p * ratio)


@triton.jit
def store_normalisers(table, lanes, normalisers):
    store_rows(field_of(table, 0, lanes.length), lanes, normalisers.shift)
    store_rows(field_of(table, 1, lanes.length), lanes, normalisers.scale)
    store_rows(field_of(table, 2, lanes.length), lanes, normalisers.ref_shift)
    store_rows(field_of(table, 3, lanes.length), lanes, normalisers.ref_scale)
    store_rows(field_of(table, 4, lanes.length), lanes, normalisers.offset)


@triton.jit
def load_normalisers(table, index, length):
    """The normalisers of one row."""
    at = table + index
    return Normalisers(
        shift=tl.load(field_of(at, 0, length)),
        scale=tl.load(field_of(at, 1, length)),
        ref_shift=tl.load(field_of(at, 2, length)),
        ref_scale=tl.load(field_of(at, 3, length)),
        offset=tl.load(field_of(at, 4, length)),
    )


@triton.jit
def block_terms(row, ref_row, at, columns, rate, normalisers, PLAIN: tl.constexpr):
    """(THREADS,): the KL terms of a block, summed per thread."""
    gap = load_block(row, at, columns, PLAIN) - normalisers.shift
    ref_gap = load_block(ref_row, at, columns, PLAIN) - normalisers.ref_shift
    # subtract the gaps first and divide by the temperature afterwards, so that equal rows give exactly 0
    ratio = (ref_gap - gap) * (rate / LOG2E) + normalisers.offset
    p = tl.exp2(gap * rate) * normalisers.scale
    r = tl.exp2(ref_gap * rate) * normalisers.ref_scale
    return thread_sum(kl_terms(p, ratio, r))


@kernel(general=GENERAL)
def sum_terms(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, ref_logits,
    ref_stride, normalisers, terms, VECTOR: tl.constexpr,
):  # fmt: skip
    """terms (segments, length): the sum of the KL terms of each segment of each live row."""
    index, segment = row_and_segment(vocab)
    if live is not None:
        if tl.load(live + index) == 0:
            return
    target = row_target(targets, index, vocab)
    rate = LOG2E / temperature_of_row(temperature, temperature_stride, index)
    of_row = load_normalisers(normalisers, index, length)
    row = Row(logits + tl.multiple_of(index * logits_stride, VECTOR), vocab, target, softcap)
    ref_row = Row(ref_logits + tl.multiple_of(index * ref_stride, VECTOR), vocab, target, softcap)
    columns = block_columns(VECTOR)

    # Each thread keeps one sum in a register; one reduction over the threads follows at the end.
    total = tl.zeros((THREADS,), tl.float32)
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, vocab)
    for at in range(start, stop, BLOCK):
        if is_plain(at, row):
            total += block_terms(row, ref_row, at, columns, rate=rate, normalisers=of_row, PLAIN=True)
        else:
            total += block_terms(row, ref_row, at, columns, rate=rate, normalisers=of_row, PLAIN=False)
    tl.store(terms + segment * length.to(tl.int64) + index, tl.sum(total, axis=0))


def kl_parts(rows: Rows, logits: Logits, ref_logits: Logits, normalisers: Tensor) -> Tensor:
    """The KL terms of each segment of the live rows, (segments, length)."""
    segments = segments_of(rows)
    terms = torch.empty(segments, rows.length, dtype=torch.float32, device=normalisers.device)
    launch(
        sum_terms,
        (rows.length * segments,),
        **row_arguments(rows),
        logits=logits.data,
        logits_stride=logits.row_stride,
        ref_logits=ref_logits.data,
        ref_stride=ref_logits.row_stride,
        normalisers=normalisers,
        terms=terms,
        VECTOR=vector(logits, ref_logits),
        num_warps=WARPS,
    )
    return terms


@triton.jit
def join_terms(lanes, terms, segments):
    """The sum over each row's segments, in order."""
    total = tl.zeros((ROWS,), tl.float32)
    term = terms + lanes.row
    for _ in range(segments):
        total += tl.load(term, mask=lanes.alive, other=0.0)
        term += lanes.length
    return total


def empty_normalisers(rows: Rows, device: torch.device) -> Tensor:
    return torch.empty(len(Normalisers._fields), rows.length, dtype=torch.float32, device=device)
