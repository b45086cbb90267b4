"""The fold of linear_policy_ref: float32 logits of the policy and of the reference give both log-probs, the policy's
entropy and the exact KL; the policy's become the gradient of all of them together, in place.

    formula         those of masked_logprobs and exact_kl, over two tiles side by side
    bytes a row     of V columns: 8 V read for the sums, 8 V for the KL, 8 V read and 4 V written for the gradient
    passes          two, and one more for the gradient
    error           at most that of the plain float32 formula, against float64 (tests/ops/test_accuracy.py)
"""

import triton
import triton.language as tl

from .formulas import FUSED, exponential
from .gradients import empty_slopes, store_pair_slopes, store_row_slopes, write_gradient
from .pairs import empty_normalisers, join_terms, kl_parts, kl_terms, store_normalisers
from .records import LinearPolicyRef
from .rows import (
    GENERAL,
    cap_slope,
    inverse_temperatures,
    lane_rows,
    lanes_of,
    load_rows,
    segments_of,
    store_rows,
    target_logits,
)
from .sums import finish_rows, join_segments, sum_rows


@triton.jit(do_not_specialize=GENERAL)
def _normalise(
    count, vocab, targets, live, temperature, temperature_stride, softcap, logits, stride, ref_logits, ref_stride,
    parts, ref_parts, segments, logprobs, ref_logprobs, entropy, grad_logprobs, grad_entropy, normalisers, slopes,
    CAPPED: tl.constexpr,
):  # fmt: skip
    row, alive = lane_rows(count, live)
    inverse_temperature = inverse_temperatures(row, alive, temperature, temperature_stride)
    target_logit = target_logits(row, alive, targets, vocab, logits, stride, softcap, CAPPED)
    ref_target_logit = target_logits(row, alive, targets, vocab, ref_logits, ref_stride, softcap, CAPPED)
    sums = join_segments(row, alive, parts, count, segments, inverse_temperature, True)
    ref_sums = join_segments(row, alive, ref_parts, count, segments, inverse_temperature, False)
    logprob, spread, shift, mass, scale, log_norm = finish_rows(*sums, target_logit, inverse_temperature)
    ref_logprob, _, ref_shift, _, ref_scale, ref_log_norm = finish_rows(
        *ref_sums, ref_target_logit, inverse_temperature
    )
    store_rows(logprobs, row, count, alive, logprob)
    store_rows(ref_logprobs, row, count, alive, ref_logprob)
    store_rows(entropy, row, count, alive, spread)
    store_normalisers(normalisers, row, count, alive, shift, scale, ref_shift, ref_scale, log_norm - ref_log_norm)
    if slopes is not None:
        store_row_slopes(
            slopes, row, count, alive, shift, mass, scale, log_norm, target_logit, inverse_temperature, logprob,
            spread, load_rows(grad_logprobs, row, alive), load_rows(grad_entropy, row, alive), softcap, CAPPED,
        )  # fmt: skip


@triton.jit(do_not_specialize=GENERAL)
def _finish(
    count, vocab, targets, live, temperature, temperature_stride, softcap, logits, stride, terms, segments, logprobs,
    ref_logprobs, kl, grad_kl, normalisers, slopes, CAPPED: tl.constexpr,
):  # fmt: skip
    """Adds the KL's part to the slopes."""
    row, alive = lane_rows(count, live)
    logprob = load_rows(logprobs, row, alive)
    ref_logprob = load_rows(ref_logprobs, row, alive)
    p = exponential(logprob)
    at_target = kl_terms(p, ref_logprob - logprob, exponential(ref_logprob))
    divergence = at_target + join_terms(row, alive, terms, count, segments)
    store_rows(kl, row, count, alive, divergence)
    if slopes is not None:
        field = count.to(tl.int64)
        inverse_temperature = inverse_temperatures(row, alive, temperature, temperature_stride)
        pull = load_rows(grad_kl, row, alive) * inverse_temperature
        scaled_pull = pull * load_rows(normalisers + field, row, alive)
        constant = load_rows(slopes + field, row, alive)
        store_rows(slopes + field, row, count, alive, constant - tl.where(pull == 0.0, 0.0, scaled_pull * divergence))
        target_logit = target_logits(row, alive, targets, vocab, logits, stride, softcap, CAPPED)
        by_target = pull * p * (logprob - ref_logprob - divergence) * cap_slope(target_logit, softcap, CAPPED)
        slope = load_rows(slopes + 3 * field, row, alive)
        slope += tl.where((pull == 0.0) | (p == 0.0), 0.0, by_target)
        store_rows(slopes + 3 * field, row, count, alive, slope)
        ref_shift = load_rows(normalisers + 2 * field, row, alive)
        offset = load_rows(normalisers + 4 * field, row, alive)
        store_pair_slopes(slopes, row, count, alive, ref_shift, offset, -scaled_pull)


def linear_policy_ref(a: LinearPolicyRef) -> None:
    rows, logits, ref_logits, capped = a.rows, a.logits, a.ref_logits, a.rows.softcap != 0
    device = a.logprobs.device
    parts = sum_rows(rows, logits, weighted=True)
    ref_parts = sum_rows(rows, ref_logits, weighted=False)
    normalisers = empty_normalisers(rows, device)
    slopes = empty_slopes(rows, device) if a.grad.data is not None else None
    _normalise[lanes_of(rows)](
        *rows, logits.data, logits.row_stride, ref_logits.data, ref_logits.row_stride, parts, ref_parts,
        segments_of(rows), a.logprobs, a.ref_logprobs, a.entropy, a.grad_logprobs, a.grad_entropy, normalisers, slopes,
        CAPPED=capped, **FUSED,
    )  # fmt: skip
    terms = kl_parts(rows, logits, ref_logits, normalisers)
    _finish[lanes_of(rows)](
        *rows, logits.data, logits.row_stride, terms, segments_of(rows), a.logprobs, a.ref_logprobs, a.kl, a.grad_kl,
        normalisers, slopes, CAPPED=capped, **FUSED,
    )  # fmt: skip
    if slopes is not None:
        write_gradient(rows, logits, slopes, a.grad, rows.vocab, sloped=True, reference=ref_logits)
