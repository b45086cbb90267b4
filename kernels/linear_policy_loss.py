"""The fold of linear_policy_loss: float32 logits give their log-probs and entropies and become, in place, the gradient
of the clipped policy loss, the KL to the reference and the entropy bonus together.

    formula         share * (max(-A r, -A clip(r)) + kl_coef KL - entropy_coef H), by logit (policy_token, kl_slope)
    bytes a row     of V columns: 4 V read for the sums, 4 V read and at most 4 V written for the gradient
    passes          one, and one more for the gradient
    error           at most that of the plain float32 formula, against float64 (tests/ops/test_accuracy.py)
"""

import triton
import triton.language as tl

from .formulas import FUSED, bounded_log_ratio, exponential, kl_slope, policy_token
from .gradients import empty_slopes, store_row_slopes, write_gradient
from .records import LinearPolicyLoss
from .rows import (
    GENERAL,
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
def _finish(
    count, vocab, targets, live, temperature, temperature_stride, softcap, logits, stride, parts, segments,
    old_logprobs, advantages, ref_logprobs, share, low, high, dual_clip, kl_coef, entropy_coef, logprobs, entropy,
    slopes, CAPPED: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    row, alive = lane_rows(count, live)
    inverse_temperature = inverse_temperatures(row, alive, temperature, temperature_stride)
    target_logit = target_logits(row, alive, targets, vocab, logits, stride, softcap, CAPPED)
    sums = join_segments(row, alive, parts, count, segments, inverse_temperature, True)
    logprob, spread, shift, mass, scale, log_norm = finish_rows(*sums, target_logit, inverse_temperature)
    store_rows(logprobs, row, count, alive, logprob)
    store_rows(entropy, row, count, alive, spread)
    if slopes is not None:
        log_ratio = logprob - load_rows(old_logprobs, row, alive)
        ratio = exponential(bounded_log_ratio(log_ratio))
        _, grad_logprob, _ = policy_token(log_ratio, ratio, load_rows(advantages, row, alive), low, high, dual_clip)
        if ref_logprobs is not None:
            grad_logprob += kl_coef * kl_slope(logprob - load_rows(ref_logprobs, row, alive), KL)
        weight = load_rows(share, row, alive)
        store_row_slopes(
            slopes, row, count, alive, shift, mass, scale, log_norm, target_logit, inverse_temperature, logprob,
            spread, weight * grad_logprob, -weight * entropy_coef, softcap, CAPPED,
        )  # fmt: skip


def linear_policy_loss(a: LinearPolicyLoss) -> None:
    rows, logits, terms = a.rows, a.logits, a.terms
    parts = sum_rows(rows, logits, weighted=True)
    slopes = empty_slopes(rows, a.logprobs.device) if a.grad.data is not None else None
    _finish[lanes_of(rows)](
        *rows, logits.data, logits.row_stride, parts, segments_of(rows), a.old_logprobs, a.advantages,
        a.ref_logprobs if terms.kl_coef != 0 else None, a.share, 1 - terms.clip_low, 1 + terms.clip_high,
        terms.dual_clip, terms.kl_coef, terms.entropy_coef, a.logprobs, a.entropy, slopes,
        CAPPED=rows.softcap != 0, KL=terms.kl_slope, **FUSED,
    )  # fmt: skip
    if slopes is not None:
        write_gradient(rows, logits, slopes, a.grad, rows.vocab, sloped=terms.entropy_coef != 0)
