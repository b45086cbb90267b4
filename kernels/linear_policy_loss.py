"""linear_policy_loss: the fold of a chunk of float32 logits (rlhf_fast/ops/_sweep.py).

Computes log-probs and entropies of the rows. Then overwrites their logits with the gradient of clipped policy loss, KL
to the reference and entropy bonus together. With the reference's logits the KL is exact, and the sweeps are those of
linear_policy_ref.

    formula         share * (max(-A r, -A clip(r)) + kl_coef KL - entropy_coef H), by logit (policy_token, kl_slope)
    bytes a row     of V columns: 4 V read for the sums, 4 V read and at most 4 V written for the gradient; with an
                    exact KL as linear_policy_ref
    passes          one, and one more for the gradient; with an exact KL two, and one more
    error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
"""

import torch
import triton
from torch import Tensor

from .formulas import bounded_log_ratio, exponential, kernel_terms, kl_slope, policy_token
from .gradients import empty_slopes, store_row_slopes, write_gradient
from .launch import kernel, launch
from .pairs import empty_normalisers, finish_pairs, normalise_pair
from .records import LinearPolicyLoss
from .rows import (
    GENERAL,
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


@triton.jit
def _store_slopes(
    slopes, lanes, result, target_logit, softcap, inverse_temperature, old_logprobs, advantages, ref_logprobs, share,
    terms,
):  # fmt: skip
    """Writes the slopes of each row's loss, without an exact KL.

    Chain rule: d loss / d logits = d loss / d logprob * d logprob / d logits + the same for the entropy.
    """
    log_ratio = result.logprob - load_rows(old_logprobs, lanes)
    ratio = exponential(bounded_log_ratio(log_ratio))
    _, grad_logprob, _ = policy_token(log_ratio, ratio, load_rows(advantages, lanes), terms)
    if ref_logprobs is not None:
        difference = result.logprob - load_rows(ref_logprobs, lanes)
        grad_logprob += terms.kl_coef * kl_slope(difference, terms.kl_slope)
    weight = load_rows(share, lanes)
    store_row_slopes(
        slopes,
        lanes,
        result,
        target_logit=target_logit,
        softcap=softcap,
        inverse_temperature=inverse_temperature,
        grad_logprob=weight * grad_logprob,
        grad_entropy=-weight * terms.entropy_coef,
    )


@kernel(general=GENERAL)
def _finish(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, parts, segments,
    old_logprobs, advantages, ref_logprobs, share, terms, logprobs, entropy, slopes,
):  # fmt: skip
    """Combines the segments of each row, writes its results and, if a gradient is wanted, its slopes."""
    lanes = lanes_of_program(length, live)
    inverse_temperature = inverse_temperatures(lanes, temperature, temperature_stride)
    target_logit = target_logits(lanes, targets, vocab, logits, logits_stride, softcap)
    sums = join_segments(lanes, parts, segments, inverse_temperature)
    result = finish_rows(sums, target_logit, inverse_temperature)
    store_rows(logprobs, lanes, result.logprob)
    store_rows(entropy, lanes, result.entropy)
    if slopes is not None:
        _store_slopes(
            slopes, lanes, result, target_logit, softcap, inverse_temperature, old_logprobs, advantages, ref_logprobs,
            share, terms,
        )  # fmt: skip


@kernel(general=GENERAL)
def _normalise(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, ref_logits,
    ref_stride, parts, ref_parts, segments, old_logprobs, advantages, share, terms, logprobs, ref_logprobs, entropy,
    normalisers, slopes,
):  # fmt: skip
    """With an exact KL, after the first sweep: all results except the KL, and the slopes without it."""
    lanes = lanes_of_program(length, live)
    inverse_temperature = inverse_temperatures(lanes, temperature, temperature_stride)
    p = normalise_pair(
        lanes, vocab, targets, softcap, logits, logits_stride, ref_logits, ref_stride, parts, ref_parts, segments,
        inverse_temperature, logprobs, ref_logprobs, entropy, normalisers,
    )  # fmt: skip
    if slopes is not None:
        target_logit = target_logits(lanes, targets, vocab, logits, logits_stride, softcap)
        _store_slopes(
            slopes, lanes, p, target_logit, softcap, inverse_temperature, old_logprobs, advantages, None, share, terms
        )


def linear_policy_loss(a: LinearPolicyLoss) -> None:
    slopes = empty_slopes(a.rows, a.logprobs.device) if a.grad.data is not None else None
    if a.ref_logits.data is None:
        _fold(a, slopes)
    else:
        _fold_with_reference(a, slopes)


def _fold(a: LinearPolicyLoss, slopes: Tensor | None) -> None:
    rows, logits, terms = a.rows, a.logits, a.terms
    launch(
        _finish,
        grid_of_rows(rows),
        **row_arguments(rows),
        logits=logits.data,
        logits_stride=logits.row_stride,
        parts=sum_rows(rows, logits),
        segments=segments_of(rows),
        old_logprobs=a.old_logprobs,
        advantages=a.advantages,
        ref_logprobs=a.ref_logprobs if terms.kl_coef != 0 else None,
        share=a.share,
        terms=kernel_terms(terms),
        logprobs=a.logprobs,
        entropy=a.entropy,
        slopes=slopes,
    )
    if slopes is not None:
        write_gradient(rows, logits, slopes, a.grad, rows.vocab)


def _fold_with_reference(a: LinearPolicyLoss, slopes: Tensor | None) -> None:
    rows, logits, ref_logits = a.rows, a.logits, a.ref_logits
    assert a.kl is not None  # given with ref_logits
    normalisers = empty_normalisers(rows, a.logprobs.device)
    ref_logprobs = torch.empty_like(a.logprobs)
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
        old_logprobs=a.old_logprobs,
        advantages=a.advantages,
        share=a.share,
        terms=kernel_terms(a.terms),
        logprobs=a.logprobs,
        ref_logprobs=ref_logprobs,
        entropy=a.entropy,
        normalisers=normalisers,
        slopes=slopes,
    )
    finish_pairs(
        rows,
        logits,
        ref_logits,
        a.grad,
        logprobs=a.logprobs,
        ref_logprobs=ref_logprobs,
        kl=a.kl,
        grad_kl=a.share,
        kl_coef=a.terms.kl_coef,
        normalisers=normalisers,
        slopes=slopes,
    )
