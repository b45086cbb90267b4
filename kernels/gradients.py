"""The gradient of rows of logits in one sweep. A small kernel, one row a lane, prepares the factors of each row; so the
sweep is the same for every op. slopes (7, count), of which the last three are there for a pair of rows alone:

    shift, constant, slope              e^(gap / temperature) * (constant + slope * gap + ratio_slope * ratio), for a
    ref_shift, offset, ratio_slope      column other than the target, with gap = x - shift and
                                        ratio = (ref_x - ref_shift - gap) / temperature + offset = log(r_j / p_j)
    at_target                           the target's column
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED, exponential
from .numbers import FAR, LOG2E, at_most, rounded
from .records import Logits, Rows
from .rows import (
    BLOCK,
    GENERAL,
    SEGMENT,
    WARPS,
    block_columns,
    cap_slope,
    is_plain,
    load_block,
    row_and_segment,
    row_target,
    store_rows,
    vector,
    vector_starts,
)


def empty_slopes(rows: Rows, device: torch.device) -> Tensor:
    return torch.empty(7, rows.length, dtype=torch.float32, device=device)


@triton.jit
def target_slope(mass, logprob, entropy, grad_logprob, grad_entropy):
    """grad_logprob * d logprob + grad_entropy * d entropy, by the target's logit after cap and temperature."""
    far_logprob = tl.where(logprob < -FAR, -FAR, logprob)
    by_entropy = grad_entropy * exponential(logprob) * (entropy + far_logprob)
    return grad_logprob * mass - tl.where(grad_entropy == 0.0, 0.0, by_entropy)


@triton.jit
def store_slopes(slopes, row, count, alive, shift, constant, slope, at_target):
    store_rows(slopes, row, count, alive, shift)
    store_rows(slopes + count, row, count, alive, constant)
    store_rows(slopes + 2 * count.to(tl.int64), row, count, alive, slope)
    store_rows(slopes + 3 * count.to(tl.int64), row, count, alive, at_target)


@triton.jit
def store_row_slopes(
    slopes, row, count, alive, shift, mass, scale, log_norm, target_logit, inverse_temperature, logprob, entropy,
    grad_logprob, grad_entropy, softcap, CAPPED: tl.constexpr,
):  # fmt: skip
    """Those of grad_logprob * logprob + grad_entropy * entropy."""
    scale *= inverse_temperature
    by_entropy = tl.where(grad_entropy == 0.0, 0.0, grad_entropy * (at_most(log_norm, FAR) - entropy))
    at_target = target_slope(mass, logprob, entropy, grad_logprob, grad_entropy)
    at_target *= inverse_temperature * cap_slope(target_logit, softcap, CAPPED)
    slope = -grad_entropy * scale * inverse_temperature
    store_slopes(slopes, row, count, alive, shift, scale * (by_entropy - grad_logprob), slope, at_target)


@triton.jit
def store_pair_slopes(slopes, row, count, alive, ref_shift, offset, ratio_slope):
    store_rows(slopes + 4 * count.to(tl.int64), row, count, alive, ref_shift)
    store_rows(slopes + 5 * count.to(tl.int64), row, count, alive, offset)
    store_rows(slopes + 6 * count.to(tl.int64), row, count, alive, ratio_slope)


@triton.jit
def load_slopes(slopes, row, count):
    """Those of a row. What is not used is not loaded, and need not have been stored."""
    field = count.to(tl.int64)
    at = slopes + row
    first = tl.load(at), tl.load(at + field), tl.load(at + 2 * field), tl.load(at + 3 * field)
    return first, (tl.load(at + 4 * field), tl.load(at + 5 * field), tl.load(at + 6 * field))


@triton.jit
def block_gradient(
    data, ref_data, at, offsets, vocab, target, rate, softcap, slopes, CAPPED: tl.constexpr,
    SLOPED: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Of the block at ``at``, with the slopes of its row."""
    of_row, of_pair = slopes
    shift, constant, slope, at_target = of_row
    ref_shift, offset, ratio_slope = of_pair
    x = load_block(data, at, offsets, vocab, target, softcap, CAPPED, PLAIN)
    gap = x - shift
    e = tl.exp2(gap * rate)
    factor = constant
    if SLOPED:
        # an infinite gap meets 0, but a NaN in the factors has to show
        factor += slope * tl.where(e == 0.0, 0.0, gap)
    if ref_data is not None:
        ref_x = load_block(ref_data, at, offsets, vocab, target, softcap, CAPPED, PLAIN)
        ratio = ((ref_x - ref_shift) - gap) * (rate / LOG2E) + offset
        factor += ratio_slope * tl.where(e * ratio_slope == 0.0, 0.0, ratio)
    g = e * factor * cap_slope(x, softcap, CAPPED)
    if not PLAIN:
        g = tl.where(at + offsets == target, at_target, g)
        g = tl.where(at + offsets < vocab, g, 0.0)
    return g


@triton.jit(do_not_specialize=GENERAL)
def write_segments(
    vocab, targets, live, temperature, temperature_stride, softcap, logits, stride, ref_logits, ref_stride, slopes,
    grad, grad_stride, columns, count, VECTOR: tl.constexpr, CAPPED: tl.constexpr, SLOPED: tl.constexpr,
):  # fmt: skip
    """The gradient of a segment. ``grad`` may be the logits, where it is of their type."""
    row, segment = row_and_segment(columns)
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, columns)
    offsets = block_columns(VECTOR)
    begins = vector_starts(VECTOR)
    out = grad + tl.multiple_of(row * grad_stride, VECTOR)
    kind: tl.constexpr = grad.dtype.element_ty
    alive = True
    if live is not None:
        alive = tl.load(live + row) != 0
    if alive:
        target = row_target(targets, row, vocab)
        rate = LOG2E / tl.load(temperature + row * temperature_stride)
        data = logits + tl.multiple_of(row * stride, VECTOR)
        ref_data = None
        if ref_logits is not None:
            ref_data = ref_logits + tl.multiple_of(row * ref_stride, VECTOR)
        factors = load_slopes(slopes, row, count)
        for at in range(start, stop, BLOCK):
            if is_plain(at, vocab, target):
                g = block_gradient(
                    data, ref_data, at, offsets, vocab, target, rate, softcap, factors, CAPPED, SLOPED, True
                )
                tl.store(out + at + offsets, rounded(g, kind))
            else:
                g = block_gradient(
                    data, ref_data, at, offsets, vocab, target, rate, softcap, factors, CAPPED, SLOPED, False
                )
                tl.store(out + at + offsets, rounded(g, kind), mask=at + begins < stop)
    else:
        for at in range(start, stop, BLOCK):
            tl.store(out + at + offsets, tl.zeros(offsets.shape, kind), mask=at + begins < stop)


def write_gradient(
    rows: Rows,
    logits: Logits,
    slopes: Tensor,
    grad: Logits,
    columns: int,
    *,
    sloped: bool,
    reference: Logits | None = None,
) -> None:
    """Into ``columns`` columns of grad, 0 past the vocabulary and in dead rows. Without ``sloped`` the slopes are 0.

    ``reference`` is the other row of a pair.
    """
    segments = triton.cdiv(columns, SEGMENT.value)
    ref_data, ref_stride = (None, 0) if reference is None else (reference.data, reference.row_stride)
    width = vector(logits, reference or logits, grad)
    write_segments[(rows.length * segments,)](
        *rows[1:], logits.data, logits.row_stride, ref_data, ref_stride, slopes, grad.data, grad.row_stride, columns,
        rows.length, VECTOR=width if columns % width == 0 else 1, CAPPED=rows.softcap != 0, SLOPED=sloped,
        num_warps=WARPS, **FUSED,
    )  # fmt: skip
