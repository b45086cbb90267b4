"""The last sweep: the gradient of rows of logits, the same kernel for every op.

First, a kernel per row writes the RowSlopes, the coefficients of each row's gradient, to a table (7, length). Then the
sweep reads the logits once and writes the gradient once. With gap = x - shift, the gradient of a column other than the
target is

    e^(gap / temperature) * (constant + slope * gap + ratio_slope * ratio)
    ratio = log(r_j / p_j) = (ref_x - ref_shift - gap) / temperature + offset

The last term and the last three fields are used only for a pair of rows, policy p and reference r.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import exponential
from .launch import kernel, launch
from .numbers import FAR, LOG2E, at_most, rounded
from .records import Logits, Rows
from .rows import (
    BLOCK,
    GENERAL,
    SEGMENT,
    WARPS,
    Row,
    block_columns,
    cap_slope,
    field_of,
    load_block,
    row_and_segment,
    row_arguments,
    row_target,
    store_rows,
    temperature_of_row,
    vector,
    vector_starts,
)


class RowSlopes(NamedTuple):
    """The coefficients of a row's gradient, in the order of the table's rows."""

    shift: tl.tensor
    constant: tl.tensor
    slope: tl.tensor
    at_target: tl.tensor  # the gradient of the target's column
    ref_shift: tl.tensor
    offset: tl.tensor
    ratio_slope: tl.tensor


def empty_slopes(rows: Rows, device: torch.device) -> Tensor:
    return torch.empty(len(RowSlopes._fields), rows.length, dtype=torch.float32, device=device)


@triton.jit
def target_slope(others_mass, logprob, entropy, grad_logprob, grad_entropy, grad_logsumexp):
    """d (grad_logprob * logprob + ...) / d target's logit, before softcap and temperature."""
    far_logprob = tl.where(logprob < -FAR, -FAR, logprob)  # e^-inf * -inf would be NaN
    by_entropy = grad_entropy * (entropy + far_logprob)
    by_entropy = tl.where(grad_entropy == 0.0, 0.0, by_entropy)
    return grad_logprob * others_mass + exponential(logprob) * (grad_logsumexp - by_entropy)


@triton.jit
def store_slopes(slopes, lanes, shift, constant, slope, at_target):
    store_rows(field_of(slopes, 0, lanes.length), lanes, shift)
    store_rows(field_of(slopes, 1, lanes.length), lanes, constant)
    store_rows(field_of(slopes, 2, lanes.length), lanes, slope)
    store_rows(field_of(slopes, 3, lanes.length), lanes, at_target)


@triton.jit
def store_pair_slopes(slopes, lanes, ref_shift, offset, ratio_slope):
    store_rows(field_of(slopes, 4, lanes.length), lanes, ref_shift)
    store_rows(field_of(slopes, 5, lanes.length), lanes, offset)
    store_rows(field_of(slopes, 6, lanes.length), lanes, ratio_slope)


@triton.jit
def store_row_slopes(
    slopes, lanes, result, target_logit, softcap, inverse_temperature, grad_logprob, grad_entropy, grad_logsumexp=0.0
):  # fmt: skip
    """The slopes of grad_logprob * logprob + the same of entropy and logsumexp, from the RowResult of each row."""
    scale = result.scale * inverse_temperature
    # An entropy whose gradient is 0 may be infinite or NaN; its product must be 0.
    by_entropy = grad_entropy * (at_most(result.log_norm, FAR) - result.entropy)
    by_entropy = tl.where(grad_entropy == 0.0, 0.0, by_entropy)
    at_target = target_slope(
        result.others_mass, result.logprob, result.entropy, grad_logprob, grad_entropy, grad_logsumexp
    )
    store_slopes(
        slopes,
        lanes,
        shift=result.shift,
        constant=scale * (by_entropy - grad_logprob + grad_logsumexp),
        slope=-grad_entropy * scale * inverse_temperature,
        at_target=at_target * (inverse_temperature * cap_slope(target_logit, softcap)),
    )


@triton.jit
def load_slopes(slopes, index, length):
    """The slopes of one row. The compiler drops unused loads, so unused fields may be uninitialised."""
    at = slopes + index
    return RowSlopes(
        shift=tl.load(field_of(at, 0, length)),
        constant=tl.load(field_of(at, 1, length)),
        slope=tl.load(field_of(at, 2, length)),
        at_target=tl.load(field_of(at, 3, length)),
        ref_shift=tl.load(field_of(at, 4, length)),
        offset=tl.load(field_of(at, 5, length)),
        ratio_slope=tl.load(field_of(at, 6, length)),
    )


@triton.jit
def block_gradient(row, ref_row, at, columns, rate, slopes):
    """The gradient of the block at ``at``. ``ref_row.data`` is None without a reference."""
    x = load_block(row, at, columns)
    gap = x - slopes.shift
    e = tl.exp2(gap * rate)
    # A gap of -inf has e = 0, and 0 * -inf must be 0. A NaN in the slopes still reaches the gradient.
    factor = slopes.constant + slopes.slope * tl.where(e == 0.0, 0.0, gap)
    if ref_row.data is not None:
        ref_x = load_block(ref_row, at, columns)
        # subtract the gaps first and divide by the temperature afterwards, so that equal rows give exactly 0
        ratio = ((ref_x - slopes.ref_shift) - gap) * (rate / LOG2E) + slopes.offset
        factor += slopes.ratio_slope * tl.where(e * slopes.ratio_slope == 0.0, 0.0, ratio)
    g = e * factor * cap_slope(x, row.softcap)
    g = tl.where(columns == row.target - at, slopes.at_target, g)
    return tl.where(columns < row.vocab - at, g, 0.0)


@kernel(general=GENERAL)
def write_segments(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, ref_logits,
    ref_stride, slopes, grad, grad_stride, columns, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a segment. ``grad`` may be the logits themselves if it has their dtype.

    In place is safe: each block is read as a whole before it is written, and no other program reads it.
    """
    index, segment = row_and_segment(columns)
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, columns)
    offsets = block_columns(VECTOR)
    begins = vector_starts(VECTOR)
    out = grad + tl.multiple_of(index * grad_stride, VECTOR)
    kind: tl.constexpr = grad.dtype.element_ty
    alive = True
    if live is not None:
        alive = tl.load(live + index) != 0
    if alive:
        # 1. The scalars of the row, loaded once per program.
        rate = LOG2E / temperature_of_row(temperature, temperature_stride, index)
        target = row_target(targets, index, vocab)
        row = Row(logits + tl.multiple_of(index * logits_stride, VECTOR), vocab, target, softcap)
        ref_data = ref_logits
        if ref_logits is not None:
            ref_data += tl.multiple_of(index * ref_stride, VECTOR)
        ref_row = Row(ref_data, vocab, target, softcap)  # Triton 3.6 cannot tell whether a tuple with a None is None
        of_row = load_slopes(slopes, index, length)
        # 2. Block by block: read, compute, write.
        for at in range(start, stop, BLOCK):
            g = block_gradient(row, ref_row, at, offsets, rate=rate, slopes=of_row)
            tl.store(out + at + offsets, rounded(g, kind), mask=begins < stop - at)
    else:
        # A dead row is not read, because its logits may be NaN.
        for at in range(start, stop, BLOCK):
            tl.store(out + at + offsets, tl.zeros(offsets.shape, kind), mask=begins < stop - at)


def write_gradient(
    rows: Rows,
    logits: Logits,
    slopes: Tensor,
    grad: Logits,
    columns: int,
    reference: Logits | None = None,
) -> None:
    """Writes ``columns`` columns of grad, 0 past the vocabulary and in dead rows.

    ``reference`` has the logits of the reference, for pairs of rows.
    """
    segments = triton.cdiv(columns, SEGMENT.value)
    ref_data, ref_stride = (None, 0) if reference is None else (reference.data, reference.row_stride)
    width = vector(logits, reference or logits, grad)
    launch(
        write_segments,
        (rows.length * segments,),
        **row_arguments(rows),
        logits=logits.data,
        logits_stride=logits.row_stride,
        ref_logits=ref_data,
        ref_stride=ref_stride,
        slopes=slopes,
        grad=grad.data,
        grad_stride=grad.row_stride,
        columns=columns,
        VECTOR=width if columns % width == 0 else 1,  # a vector store must not extend past the last column
        num_warps=WARPS,
    )
