"""The fold of linear_policy_ref: float32 logits of the policy and of the reference give both log-probs, the policy's
entropy and the exact KL; the policy's become the gradient of all of them together, in place.
"""

import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED, exponential
from .gradients import empty_slopes, store_pair_slopes, store_row_slopes, write_gradient
from .pairs import empty_normalisers, join_terms, kl_parts, kl_terms, store_normalisers
from .rows import GENERAL, Rows, cap_slope, inverse_temperatures, lane_rows, load_rows, store_rows, target_logits
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


def linear_policy_ref(
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
    ref_logits: Tensor,
    ref_stride: int,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    entropy: Tensor,
    kl: Tensor,
    grad: Tensor | None,
    grad_dtype: int,
    grad_stride: int,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
) -> None:
    rows = Rows(count, vocab, targets, live, temperature, temperature_stride, softcap)
    parts = sum_rows(rows, logits, stride, weighted=True)
    ref_parts = sum_rows(rows, ref_logits, ref_stride, weighted=False)
    normalisers = empty_normalisers(rows, logits.device)
    slopes = empty_slopes(rows, logits.device) if grad is not None else None
    _normalise[rows.lanes()](
        *rows, logits, stride, ref_logits, ref_stride, parts, ref_parts, rows.segments(), logprobs, ref_logprobs,
        entropy, grad_logprobs, grad_entropy, normalisers, slopes, CAPPED=softcap != 0, **FUSED,
    )  # fmt: skip
    terms = kl_parts(rows, logits, stride, ref_logits, ref_stride, normalisers)
    _finish[rows.lanes()](
        *rows, logits, stride, terms, rows.segments(), logprobs, ref_logprobs, kl, grad_kl, normalisers, slopes,
        CAPPED=softcap != 0, **FUSED,
    )  # fmt: skip
    if grad is not None and slopes is not None:
        reference = ref_logits, ref_stride
        write_gradient(rows, logits, stride, slopes, grad, grad_stride, vocab, sloped=True, reference=reference)
