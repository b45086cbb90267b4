"""linear_policy_ref: the fold of two chunks of float32 logits, the policy's and the reference's
(rlhf_fast/ops/_sweep.py).

Computes both log-probs, the policy's entropy and the exact KL. Then overwrites the policy's logits with the gradient of
their weighted sum.

    formula         those of masked_logprobs and exact_kl
    bytes a row     of V columns: 8 V read for the sums, 8 V for the KL, 8 V read and 4 V written for the gradient
    passes          two, and one more for the gradient
    error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
"""

import triton.language as tl

from .formulas import exponential
from .gradients import empty_slopes, store_pair_slopes, store_row_slopes, write_gradient
from .launch import kernel, launch
from .pairs import Normalisers, empty_normalisers, join_terms, kl_parts, kl_terms, store_normalisers
from .records import LinearPolicyRef
from .rows import (
    GENERAL,
    cap_slope,
    field_of,
    grid_of_rows,
    inverse_temperatures,
    lanes_of_program,
    load_rows,
    row_arguments,
    segments_of,
    store_rows,
    target_logits,
)
from .sums import finish_rows, join_segments, sum_rows


@kernel(general=GENERAL)
def _normalise(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, ref_logits,
    ref_stride, parts, ref_parts, segments, logprobs, ref_logprobs, entropy, grad_logprobs, grad_entropy, normalisers,
    slopes,
):  # fmt: skip
    """After the first sweep: all results except the KL, and the slopes of log-prob and entropy."""
    lanes = lanes_of_program(length, live)
    inverse_temperature = inverse_temperatures(lanes, temperature, temperature_stride)
    target_logit = target_logits(lanes, targets, vocab, logits, logits_stride, softcap)
    ref_target_logit = target_logits(lanes, targets, vocab, ref_logits, ref_stride, softcap)
    sums = join_segments(lanes, parts, segments, inverse_temperature, True)
    ref_sums = join_segments(lanes, ref_parts, segments, inverse_temperature, False)
    p = finish_rows(sums, target_logit, inverse_temperature)
    r = finish_rows(ref_sums, ref_target_logit, inverse_temperature)
    store_rows(logprobs, lanes, p.logprob)
    store_rows(ref_logprobs, lanes, r.logprob)
    store_rows(entropy, lanes, p.entropy)
    of_row = Normalisers(p.shift, p.scale, r.shift, r.scale, p.log_norm - r.log_norm)
    store_normalisers(normalisers, lanes, of_row)
    if slopes is not None:
        store_row_slopes(
            slopes,
            lanes,
            p,
            target_logit=target_logit,
            softcap=softcap,
            inverse_temperature=inverse_temperature,
            grad_logprob=load_rows(grad_logprobs, lanes),
            grad_entropy=load_rows(grad_entropy, lanes),
        )


@kernel(general=GENERAL)
def _finish(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, terms, segments,
    logprobs, ref_logprobs, kl, grad_kl, normalisers, slopes,
):  # fmt: skip
    """After the second sweep: the KL, and its part of the slopes, d KL / d x_j = p_j (log p_j - log r_j - KL)."""
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
        scaled_grad = load_rows(grad_kl, lanes) * inverse_temperature
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


def linear_policy_ref(a: LinearPolicyRef) -> None:
    rows, logits, ref_logits = a.rows, a.logits, a.ref_logits
    device = a.logprobs.device
    normalisers = empty_normalisers(rows, device)
    slopes = empty_slopes(rows, device) if a.grad.data is not None else None
    launch(
        _normalise,
        grid_of_rows(rows),
        **row_arguments(rows),
        logits=logits.data,
        logits_stride=logits.row_stride,
        ref_logits=ref_logits.data,
        ref_stride=ref_logits.row_stride,
        parts=sum_rows(rows, logits, weighted=True),
        ref_parts=sum_rows(rows, ref_logits, weighted=False),
        segments=segments_of(rows),
        logprobs=a.logprobs,
        ref_logprobs=a.ref_logprobs,
        entropy=a.entropy,
        grad_logprobs=a.grad_logprobs,
        grad_entropy=a.grad_entropy,
        normalisers=normalisers,
        slopes=slopes,
    )
    terms = kl_parts(rows, logits, ref_logits, normalisers)
    launch(
        _finish,
        grid_of_rows(rows),
        **row_arguments(rows),
        logits=logits.data,
        logits_stride=logits.row_stride,
        terms=terms,
        segments=segments_of(rows),
        logprobs=a.logprobs,
        ref_logprobs=a.ref_logprobs,
        kl=a.kl,
        grad_kl=a.grad_kl,
        normalisers=normalisers,
        slopes=slopes,
    )
    if slopes is not None:
        write_gradient(rows, logits, slopes, a.grad, rows.vocab, sloped=True, reference=ref_logits)
