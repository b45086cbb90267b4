"""The second sweep, over two rows together, the policy's and the reference's: KL(policy || reference).

The formulas are those of csrc/cpu/pairs.h, over all columns except the target. Before the sweep, a kernel per row
writes the Normalisers of each pair of rows to a table (5, length).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import exponential, k3
from .gradients import store_pair_slopes, write_gradient
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
    cap_slope,
    field_of,
    grid_of_rows,
    inverse_temperatures,
    lanes_of_program,
    load_block,
    load_rows,
    row_and_segment,
    row_arguments,
    row_target,
    segments_of,
    store_rows,
    target_logits,
    temperature_of_row,
    thread_sum,
    vector,
)
from .sums import finish_rows, join_segments


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
def block_terms(row, ref_row, at, columns, rate, normalisers):
    """(THREADS,): the KL terms of a block, summed per thread."""
    gap = load_block(row, at, columns) - normalisers.shift
    ref_gap = load_block(ref_row, at, columns) - normalisers.ref_shift
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
        total += block_terms(row, ref_row, at, columns, rate=rate, normalisers=of_row)
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


# ---- a fold of two chunks of float32 logits --------------------------------------------------------------------------
#
# A kernel per row, the op's own, calls normalise_pair and writes the slopes of log-prob and entropy. Then finish_pairs
# launches the second sweep and a kernel that adds the KL.


@triton.jit
def normalise_pair(
    lanes, vocab, targets, softcap, logits, logits_stride, ref_logits, ref_stride, parts, ref_parts, segments,
    inverse_temperature, logprobs, ref_logprobs, entropy, normalisers,
):  # fmt: skip
    """Writes the results of each pair of rows except the KL, and the normalisers. -> the policy's RowResult"""
    target_logit = target_logits(lanes, targets, vocab, logits, logits_stride, softcap)
    ref_target_logit = target_logits(lanes, targets, vocab, ref_logits, ref_stride, softcap)
    sums = join_segments(lanes, parts, segments, inverse_temperature)
    ref_sums = join_segments(lanes, ref_parts, segments, inverse_temperature)
    p = finish_rows(sums, target_logit, inverse_temperature)
    r = finish_rows(ref_sums, ref_target_logit, inverse_temperature)
    store_rows(logprobs, lanes, p.logprob)
    store_rows(ref_logprobs, lanes, r.logprob)
    store_rows(entropy, lanes, p.entropy)
    of_row = Normalisers(p.shift, p.scale, r.shift, r.scale, p.log_norm - r.log_norm)
    store_normalisers(normalisers, lanes, of_row)
    return p


@kernel(general=GENERAL)
def add_kl(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, terms, segments,
    logprobs, ref_logprobs, kl, grad_kl, kl_coef, normalisers, slopes,
):  # fmt: skip
    """After the second sweep: the KL, and its part of the slopes, grad_kl * kl_coef times
    d KL / d x_j = p_j (log p_j - log r_j - KL).
    """
    lanes = lanes_of_program(length, live)
    # 1. The KL: the target's term plus those of the other columns.
    logprob = load_rows(logprobs, lanes)
    ref_logprob = load_rows(ref_logprobs, lanes)
    p = exponential(logprob)
    target_term = kl_terms(p, ref_logprob - logprob, exponential(ref_logprob))
    divergence = target_term + join_terms(lanes, terms, segments)
    store_rows(kl, lanes, divergence)
    if slopes is not None:
        # 2. The slopes of the other columns. An infinite KL with a gradient of 0 must add 0, not NaN.
        inverse_temperature = inverse_temperatures(lanes, temperature, temperature_stride)
        scaled_grad = load_rows(grad_kl, lanes) * kl_coef * inverse_temperature
        ratio_slope = scaled_grad * load_rows(field_of(normalisers, 1, length), lanes)
        constants = field_of(slopes, 1, length)
        by_kl = tl.where(scaled_grad == 0.0, 0.0, ratio_slope * divergence)
        store_rows(constants, lanes, load_rows(constants, lanes) - by_kl)
        # 3. The target's column. Its term is 0 if its probability is 0, because 0 * log 0 = 0.
        target_logit = target_logits(lanes, targets, vocab, logits, logits_stride, softcap)
        by_target = scaled_grad * p * (logprob - ref_logprob - divergence) * cap_slope(target_logit, softcap)
        at_target = field_of(slopes, 3, length)
        slope = load_rows(at_target, lanes)
        slope += tl.where((scaled_grad == 0.0) | (p == 0.0), 0.0, by_target)
        store_rows(at_target, lanes, slope)
        # 4. The slopes that only a pair of rows has.
        store_pair_slopes(
            slopes,
            lanes,
            ref_shift=load_rows(field_of(normalisers, 2, length), lanes),
            offset=load_rows(field_of(normalisers, 4, length), lanes),
            ratio_slope=-ratio_slope,
        )


def finish_pairs(
    rows: Rows,
    logits: Logits,
    ref_logits: Logits,
    grad: Logits,
    *,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kl: Tensor,
    grad_kl: Tensor | None,
    kl_coef: float,
    normalisers: Tensor,
    slopes: Tensor | None,
) -> None:
    """Writes the KL and, with ``slopes``, the gradient: that of the slopes and grad_kl * kl_coef times the KL's."""
    launch(
        add_kl,
        grid_of_rows(rows),
        **row_arguments(rows),
        logits=logits.data,
        logits_stride=logits.row_stride,
        terms=kl_parts(rows, logits, ref_logits, normalisers),
        segments=segments_of(rows),
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        kl=kl,
        grad_kl=grad_kl,
        kl_coef=kl_coef,
        normalisers=normalisers,
        slopes=slopes,
    )
    if slopes is not None:
        write_gradient(rows, logits, slopes, grad, rows.vocab, reference=ref_logits)
