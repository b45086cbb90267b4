"""The fold of linear_policy_loss: float32 logits give their log-probs and entropies and become, in place, the gradient
of the clipped policy loss, the KL to the reference and the entropy bonus together.
"""

import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED, bounded_log_ratio, exponential, kl_slope, policy_token
from .gradients import empty_slopes, store_row_slopes, write_gradient
from .rows import GENERAL, Rows, inverse_temperatures, lane_rows, load_rows, store_rows, target_logits
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


def linear_policy_loss(
    count: int,
    vocab: int,
    targets: Tensor,
    live: Tensor | None,
    temperature: Tensor,
    temperature_stride: int,
    softcap: float,
    threads: int,
    logits: Tensor,
    stride: int,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    share: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    entropy_coef: float,
    kl_slope_code: int,
    grad: Tensor | None,
    grad_dtype: int,
    grad_stride: int,
    logprobs: Tensor,
    entropy: Tensor,
) -> None:
    rows = Rows(count, vocab, targets, live, temperature, temperature_stride, softcap)
    parts = sum_rows(rows, logits, stride, weighted=True)
    slopes = empty_slopes(rows, logits.device) if grad is not None else None
    _finish[rows.lanes()](
        *rows, logits, stride, parts, rows.segments(), old_logprobs, advantages,
        ref_logprobs if kl_coef != 0 else None, share, 1 - clip_low, 1 + clip_high, dual_clip, kl_coef, entropy_coef,
        logprobs, entropy, slopes, CAPPED=softcap != 0, KL=kl_slope_code, **FUSED,
    )  # fmt: skip
    if grad is not None and slopes is not None:
        write_gradient(rows, logits, stride, slopes, grad, grad_stride, vocab, sloped=entropy_coef != 0)
