"""KL(policy || reference) over the whole vocabulary. The forward reads both rows for their normalisers and again for
the terms; the backward reads them once more.

    formula         sum_j p_j log(p_j / r_j) - p_j + r_j, no term of which is negative
    bytes a row     of V columns of b bytes: forward 4 V b read, 20 written; backward 2 V b read, V b written
    passes          forward two, backward one
    error           at most that of the plain float32 formula, against float64 (tests/ops/test_accuracy.py)
"""

import triton

from .formulas import FUSED
from .gradients import empty_slopes, store_pair_slopes, store_slopes, write_gradient
from .numbers import log1p
from .pairs import empty_normalisers, join_terms, kl_parts, store_normalisers
from .records import ExactKl, ExactKlBackward
from .rows import GENERAL, inverse_temperatures, lane_rows, lanes_of, load_rows, segments_of, store_rows
from .sums import join_segments, sum_rows


@triton.jit(do_not_specialize=GENERAL)
def _normalise(
    count, live, temperature, temperature_stride, parts, ref_parts, segments, normalisers, statistics
):  # fmt: skip
    """A row with nothing above -inf has no normaliser: its infinite shift makes it NaN."""
    row, alive = lane_rows(count, live)
    inverse_temperature = inverse_temperatures(row, alive, temperature, temperature_stride)
    shift, tops, rest, _ = join_segments(row, alive, parts, count, segments, inverse_temperature, False)
    ref_shift, ref_tops, ref_rest, _ = join_segments(row, alive, ref_parts, count, segments, inverse_temperature, False)
    offset = log1p(tops - 1.0 + rest) - log1p(ref_tops - 1.0 + ref_rest)
    scale = 1.0 / (tops + rest)
    store_normalisers(normalisers, row, count, alive, shift, scale, ref_shift, 1.0 / (ref_tops + ref_rest), offset)
    store_rows(statistics, row * 4, count * 4, alive, shift)
    store_rows(statistics + 1, row * 4, count * 4, alive, scale)
    store_rows(statistics + 2, row * 4, count * 4, alive, ref_shift)
    store_rows(statistics + 3, row * 4, count * 4, alive, offset)


@triton.jit(do_not_specialize=GENERAL)
def _finish(count, live, terms, segments, kl):
    row, alive = lane_rows(count, live)
    store_rows(kl, row, count, alive, join_terms(row, alive, terms, count, segments))


def exact_kl(a: ExactKl) -> None:
    rows, logits, ref_logits = a.rows, a.logits, a.ref_logits
    parts = sum_rows(rows, logits, weighted=False)
    ref_parts = sum_rows(rows, ref_logits, weighted=False)
    normalisers = empty_normalisers(rows, a.kl.device)
    _normalise[lanes_of(rows)](
        rows.length, rows.live, rows.temperature, rows.temperature_stride, parts, ref_parts, segments_of(rows),
        normalisers, a.statistics, **FUSED,
    )  # fmt: skip
    terms = kl_parts(rows, logits, ref_logits, normalisers)
    _finish[lanes_of(rows)](rows.length, rows.live, terms, segments_of(rows), a.kl, **FUSED)


@triton.jit(do_not_specialize=GENERAL)
def _prepare(count, live, temperature, temperature_stride, statistics, kl, grad_kl, slopes):
    """d KL / d x_j = p_j (log p_j - log r_j - KL) / temperature"""
    row, alive = lane_rows(count, live)
    pull = load_rows(grad_kl, row, alive) * inverse_temperatures(row, alive, temperature, temperature_stride)
    pull *= load_rows(statistics + 1, row * 4, alive)
    constant = -pull * load_rows(kl, row, alive)
    store_slopes(slopes, row, count, alive, load_rows(statistics, row * 4, alive), constant, 0.0, 0.0)
    ref_shift = load_rows(statistics + 2, row * 4, alive)
    store_pair_slopes(slopes, row, count, alive, ref_shift, load_rows(statistics + 3, row * 4, alive), -pull)


def exact_kl_backward(a: ExactKlBackward) -> None:
    rows = a.rows
    slopes = empty_slopes(rows, a.kl.device)
    _prepare[lanes_of(rows)](
        rows.length, rows.live, rows.temperature, rows.temperature_stride, a.statistics, a.kl, a.grad_kl, slopes,
        **FUSED,
    )  # fmt: skip
    write_gradient(rows, a.logits, slopes, a.grad, rows.vocab, sloped=False, reference=a.ref_logits)
