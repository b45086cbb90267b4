"""PPO's clipped policy loss, with dual clipping and GSPO's sequence-level ratio."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._aggregate import check_aggregation, masked_mean, ordered_sum, reduced, scalar_tensor, upcast
from ._dispatch import implementation, implements
from ._losses import LossInputs, check_ratio_level, policy_terms

LOG_RATIO_BOUND = 20.0


class PolicyLoss(NamedTuple):
    """0-dim tensors on the device of the inputs. All but ``loss`` are statistics over live tokens, without gradient."""

    loss: Tensor
    clip_fraction: Tensor  # share of tokens whose loss is clipped (by dual_clip too)
    approx_kl: Tensor  # mean of 0.5 * (logprobs - old_logprobs)^2, TRL's policy/approxkl_avg
    ratio_mean: Tensor
    ratio_max: Tensor
    ratio_var: Tensor  # divides by n, so that one token gives 0


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> PolicyLoss:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) per token, aggregated (PPO, arXiv 1707.06347).

    r = exp(logprobs - old_logprobs). The log ratio is clamped to +-20, far beyond the range of normal training; beyond
    it, the loss is that at the bound and the gradient of the token is 0. So a live -inf in one of the two log-probs
    gives a finite loss and gradient; NaN, or -inf in both, gives NaN.

    Args:
        logprobs: (B, T), or any shape for token-level ratios with token-mean; float. The only input with a gradient.
        old_logprobs: same shape; log-probs of the policy that sampled. None: it is this policy, so that every ratio
            is 1, with the gradient of the log-prob.
        advantages: same shape; positive for tokens that were better than expected.
        mask: same shape, bool or 0/1, 1 = counts. Masked tokens are not read and get gradient 0.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        clip_low, clip_high: how far the ratio may go below and above 1; 0 <= clip_low <= 1, clip_high >= 0.
        dual_clip: c > 1 bounds the loss of a token with a negative advantage by -c A (arXiv 1912.09729, eq. 5).
        ratio_level: "token"; or "sequence" for GSPO (arXiv 2507.18071), (B, T) only: every token of a sequence has
            the ratio s = exp(mean log ratio over its live tokens), in the form sg[s] * exp(logp_t - sg[logp_t]), so
            that tokens may have their own advantages (eq. 14). With "seq-mean-token-mean" it is the paper's loss.
        aggregation, num_items: see ``aggregate``; statistics are of this call's tokens.

    Returns:
        ``PolicyLoss``, float32 (float64 when an input is), all 0 when nothing is live.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges above.
    """
    op = "clipped_policy_loss"
    if old_logprobs is None:
        old_logprobs = logprobs
    _checks.alike(op, "that of logprobs", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    terms = policy_terms(op, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    check_ratio_level(op, logprobs, ratio_level)
    check_aggregation(op, logprobs, aggregation, num_items)
    live = _checks.live_mask(op, mask, logprobs.shape, logprobs.device)

    logprobs, old_logprobs, advantages = upcast(logprobs, _checks.constant(old_logprobs), _checks.constant(advantages))
    return policy_loss(
        LossInputs(
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            live=live,
            terms=terms,
            sequence_level=ratio_level == "sequence",
            aggregation=aggregation,
            num_items=scalar_tensor(num_items),
        )
    )


class ClipFractions(NamedTuple):
    """0-dim, without gradient: shares of live tokens. No token is in two of them."""

    low: Tensor  # A < 0 and r < 1 - clip_low
    high: Tensor  # A > 0 and r > 1 + clip_high
    dual: Tensor  # A < 0 and r > dual_clip


def clip_fractions(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: str = "token",
) -> ClipFractions:
    """``clipped_policy_loss``'s clip_fraction by which bound clips: low, high and the dual clip, whose sum it is.

    A function of its own, in torch, since the kernels of the losses count the three together. TRL logs the first two as
    clip_ratio/low_mean and clip_ratio/high_mean; verl low + high as pg_clipfrac and dual as pg_clipfrac_lower.

    Args:
        logprobs, old_logprobs, advantages, mask, clip_low, clip_high, dual_clip, ratio_level: as in
            ``clipped_policy_loss``.

    Returns:
        ``ClipFractions``, float32 (float64 when an input is), all 0 when nothing is live.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges of ``clipped_policy_loss``.
    """
    op = "clip_fractions"
    _checks.alike(op, "that of logprobs", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    terms = policy_terms(op, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    check_ratio_level(op, logprobs, ratio_level)
    live = _checks.live_mask(op, mask, logprobs.shape, logprobs.device)
    logprobs, old_logprobs, advantages = upcast(logprobs.detach(), old_logprobs.detach(), advantages.detach())
    if live is None:
        live = torch.ones_like(logprobs, dtype=torch.bool)
    ratio = _ratio(logprobs, old_logprobs, live, ratio_level == "sequence")[1]
    _, by_range, over = _clipped(ratio, advantages, terms)
    kinds = (by_range & (advantages < 0), by_range & (advantages > 0), over)
    return ClipFractions(*(masked_mean(kind.to(ratio.dtype), live) for kind in kinds))


def policy_loss(inputs: LossInputs) -> PolicyLoss:
    """``clipped_policy_loss`` without checks."""
    loss, statistics = implementation("clipped_policy_loss", inputs.logprobs)(inputs)
    return PolicyLoss(loss, *statistics)


@implements("clipped_policy_loss", "torch")
def reference(inputs: LossInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-> the loss, and the other fields of PolicyLoss."""
    logprobs, old_logprobs, advantages = inputs.logprobs, inputs.old_logprobs, inputs.advantages
    terms, live = inputs.terms, inputs.live
    if live is None:
        live = torch.ones_like(logprobs, dtype=torch.bool)
    log_ratio, ratio = _ratio(logprobs, old_logprobs, live, inputs.sequence_level)
    losses, by_range, over = _clipped(ratio, advantages, terms)
    clipped = by_range | over
    loss = reduced(losses, live, aggregation=inputs.aggregation, num_items=inputs.num_items)

    with torch.no_grad():
        ratio_mean = masked_mean(ratio, live)
        return loss, (
            masked_mean(clipped.to(ratio.dtype), live),
            masked_mean(0.5 * log_ratio.square(), live),
            ratio_mean,
            # ratios are >= 0, so masked tokens can count as 0; amax raises for an empty tensor
            torch.where(live, ratio, 0.0).amax() if ratio.numel() else torch.zeros_like(ratio_mean),
            masked_mean((ratio - ratio_mean).square(), live),
        )


def _ratio(logprobs: Tensor, old_logprobs: Tensor, live: Tensor, sequence_level: bool) -> tuple[Tensor, Tensor]:
    """-> the bounded log ratio of each token, 0 where masked, and its ratio."""
    # Masked data may be NaN: this where stops their gradient, and aggregate ignores their loss.
    log_ratio = bounded_log_ratio(torch.where(live, logprobs - old_logprobs, 0.0))
    return log_ratio, _sequence_ratio(log_ratio, live) if sequence_level else torch.exp(log_ratio)


def _clipped(ratio: Tensor, advantages: Tensor, terms: records.PolicyTerms) -> tuple[Tensor, Tensor, Tensor]:
    """-> the loss of each token, whether the range clips it, and whether the dual clip does."""
    # where instead of maximum, which would split the gradient at a tie. The clipped branch is selected only beyond a
    # bound, where it is constant. Detaching the ratio there also avoids 0 * inf for an infinite advantage.
    unclipped = -advantages * ratio
    at_bound = -advantages * ratio.detach().clamp(1 - terms.clip_low, 1 + terms.clip_high)
    by_range = at_bound > unclipped
    losses = torch.where(by_range, at_bound, unclipped)
    over = torch.zeros_like(by_range)
    if terms.dual_clip < math.inf:
        ceiling = -terms.dual_clip * advantages
        over = (advantages < 0) & (losses > ceiling)
        losses = torch.where(over, ceiling, losses)
    return losses, by_range, over


def bounded_log_ratio(log_ratio: Tensor) -> Tensor:
    """Clamps to +-20: exp overflows float32 above 88, and an infinite ratio in the branch of a where that is not
    selected makes the gradient NaN.

    Uses where, because torch.clamp gives a NaN input the gradient 0, which would hide the NaN.
    """
    log_ratio = torch.where(log_ratio > LOG_RATIO_BOUND, LOG_RATIO_BOUND, log_ratio)
    return torch.where(log_ratio < -LOG_RATIO_BOUND, -LOG_RATIO_BOUND, log_ratio)


def _sequence_ratio(log_ratio: Tensor, live: Tensor) -> Tensor:
    """(B, T) -> (B, T): the ratio s of the sequence, as sg[s] * exp(logp_t - sg[logp_t]), whose gradient is s per
    token."""
    constant = log_ratio.detach()
    mean = ordered_sum(constant) / live.sum(-1).clamp(min=1)  # masked log ratios are 0
    return torch.exp(mean).unsqueeze(-1) * torch.exp(log_ratio - constant)
