"""KL(policy || reference) over the whole vocabulary.

The forward reads both rows once for their normalisers and once more for the terms. The backward reads them once.

    formula         sum_j p_j log(p_j / r_j) - p_j + r_j, no term of which is negative
    bytes a row     of V columns of b bytes: forward 4 V b read, 20 written; backward 2 V b read, V b written
    passes          forward two, backward one
    error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
"""

from .gradients import empty_slopes, store_pair_slopes, store_slopes, write_gradient
from .launch import kernel, launch
from .numbers import log1p
from .pairs import Normalisers, empty_normalisers, join_terms, kl_parts, store_normalisers
from .records import ExactKl, ExactKlBackward
from .rows import (
    GENERAL,
    by_batch,
    grid_of_rows,
    inverse_temperatures,
    lanes_of_program,
    load_rows,
    segments_of,
    store_rows,
    temperature_arguments,
)
from .sums import join_segments, sum_rows


@kernel(general=GENERAL)
def _normalise(
    length, live, temperature, temperature_stride, parts, ref_parts, segments, normalisers, statistics
):  # fmt: skip
    """The normalisers of each pair of rows, for the second sweep and as the statistics of the backward.

    A row with only -inf has no softmax. Its shift of -inf makes every later result NaN.
    """
    lanes = lanes_of_program(length, live)
    inverse_temperature = inverse_temperatures(lanes, temperature, temperature_stride)
    p = join_segments(lanes, parts, segments, inverse_temperature)
    r = join_segments(lanes, ref_parts, segments, inverse_temperature)
    of_row = Normalisers(
        shift=p.shift,
        scale=1.0 / (p.tops + p.rest),
        ref_shift=r.shift,
        ref_scale=1.0 / (r.tops + r.rest),
        # log(tops + rest) as log1p(tops + rest - 1), accurate where a single column has nearly all the probability
        offset=log1p(p.tops - 1.0 + p.rest) - log1p(r.tops - 1.0 + r.rest),
    )
    store_normalisers(normalisers, lanes, of_row)
    store_rows(statistics, lanes, of_row.shift, STRIDE=4)
    store_rows(statistics + 1, lanes, of_row.scale, STRIDE=4)
    store_rows(statistics + 2, lanes, of_row.ref_shift, STRIDE=4)
    store_rows(statistics + 3, lanes, of_row.offset, STRIDE=4)


@kernel(general=GENERAL)
def _finish(length, live, terms, segments, kl):
    lanes = lanes_of_program(length, live)
    store_rows(kl, lanes, join_terms(lanes, terms, segments))


@by_batch
def exact_kl(a: ExactKl) -> None:
    rows, segments = a.rows, segments_of(a.rows)
    normalisers = empty_normalisers(rows, a.kl.device)
    launch(
        _normalise,
        grid_of_rows(rows),
        length=rows.length,
        live=rows.live,
        **temperature_arguments(rows),
        parts=sum_rows(rows, a.logits),
        ref_parts=sum_rows(rows, a.ref_logits),
        segments=segments,
        normalisers=normalisers,
        statistics=a.statistics,
    )
    terms = kl_parts(rows, a.logits, a.ref_logits, normalisers)
    launch(
        _finish,
        grid_of_rows(rows),
        length=rows.length,
        live=rows.live,
        terms=terms,
        segments=segments,
        kl=a.kl,
    )


@kernel(general=GENERAL)
def _prepare(length, live, temperature, temperature_stride, statistics, kl, grad_kl, slopes):
    """The slopes of d KL / d x_j = p_j (log p_j - log r_j - KL) / temperature, times grad_kl."""
    lanes = lanes_of_program(length, live)
    scaled_grad = load_rows(grad_kl, lanes) * inverse_temperatures(lanes, temperature, temperature_stride)
    scaled_grad *= load_rows(statistics + 1, lanes, STRIDE=4)
    store_slopes(
        slopes,
        lanes,
        shift=load_rows(statistics, lanes, STRIDE=4),
        constant=-scaled_grad * load_rows(kl, lanes),
        slope=0.0,
        at_target=0.0,  # no column is the target
    )
    store_pair_slopes(
        slopes,
        lanes,
        ref_shift=load_rows(statistics + 2, lanes, STRIDE=4),
        offset=load_rows(statistics + 3, lanes, STRIDE=4),
        ratio_slope=-scaled_grad,
    )


@by_batch
def exact_kl_backward(a: ExactKlBackward) -> None:
    rows = a.rows
    slopes = empty_slopes(rows, a.kl.device)
    launch(
        _prepare,
        grid_of_rows(rows),
        length=rows.length,
        live=rows.live,
        **temperature_arguments(rows),
        statistics=a.statistics,
        kl=a.kl,
        grad_kl=a.grad_kl,
        slopes=slopes,
    )
    write_gradient(rows, a.logits, slopes, a.grad, rows.vocab, reference=a.ref_logits)
