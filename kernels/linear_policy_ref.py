"""linear_policy_ref: the fold of two chunks of float32 logits, the policy's and the reference's
(rlhf_fast/ops/_sweep.py).

Computes both log-probs, the policy's entropy and the exact KL. Then overwrites the policy's logits with the gradient of
their weighted sum.

    formula         those of masked_logprobs and exact_kl
    bytes a row     of V columns: 8 V read for the sums, 8 V for the KL, 8 V read and 4 V written for the gradient
    passes          two, and one more for the gradient
    error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
"""

from .gradients import empty_slopes, store_row_slopes
from .launch import kernel, launch
from .pairs import empty_normalisers, finish_pairs, normalise_pair
from .records import LinearPolicyRef
from .rows import (
    GENERAL,
    grid_of_rows,
    inverse_temperatures,
    lanes_of_program,
    load_rows,
    row_arguments,
    segments_of,
    target_logits,
)
from .sums import sum_rows


@kernel(general=GENERAL)
def _normalise(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, ref_logits,
    ref_stride, parts, ref_parts, segments, logprobs, ref_logprobs, entropy, grad_logprobs, grad_entropy, normalisers,
    slopes,
):  # fmt: skip
    """After the first sweep: all results except the KL, and the slopes of log-prob and entropy."""
    lanes = lanes_of_program(length, live)
    inverse_temperature = inverse_temperatures(lanes, temperature, temperature_stride)
    p = normalise_pair(
        lanes, vocab, targets, softcap, logits, logits_stride, ref_logits, ref_stride, parts, ref_parts, segments,
        inverse_temperature, logprobs, ref_logprobs, entropy, normalisers,
    )  # fmt: skip
    if slopes is not None:
        store_row_slopes(
            slopes,
            lanes,
            p,
            target_logit=target_logits(lanes, targets, vocab, logits, logits_stride, softcap),
            softcap=softcap,
            inverse_temperature=inverse_temperature,
            grad_logprob=load_rows(grad_logprobs, lanes),
            grad_entropy=load_rows(grad_entropy, lanes),
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
        parts=sum_rows(rows, logits),
        ref_parts=sum_rows(rows, ref_logits),
        segments=segments_of(rows),
        logprobs=a.logprobs,
        ref_logprobs=a.ref_logprobs,
        entropy=a.entropy,
        grad_logprobs=a.grad_logprobs,
        grad_entropy=a.grad_entropy,
        normalisers=normalisers,
        slopes=slopes,
    )
    finish_pairs(
        rows,
        logits,
        ref_logits,
        a.grad,
        logprobs=a.logprobs,
        ref_logprobs=a.ref_logprobs,
        kl=a.kl,
        grad_kl=a.grad_kl,
        kl_coef=1.0,
        normalisers=normalisers,
        slopes=slopes,
    )
