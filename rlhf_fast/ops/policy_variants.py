"""Policy losses that are no clipped loss of a token: GSPO, CISPO, SAPO, VESPO, GMPO and GPG."""

import torch
from torch import Tensor

from . import _checks
from ._aggregate import ordered_sum, reduced
from ._policy_tokens import check_sequences, checked_tokens, lengths, with_statistics
from .clipped_policy_loss import PolicyLoss, bounded_log_ratio, clipped_policy_loss


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
    aggregation: str = "seq-mean-token-mean",
    num_items: float | Tensor | None = None,
) -> PolicyLoss:
    """``clipped_policy_loss`` with the ratio of the sequence, s = exp(mean log ratio over its live tokens), and the
    gradient of that very loss (GSPO, arXiv 2507.18071, eq. 5).

    The gradient goes through the mean, so that each token of a sequence gets an equal share of it. This is what TRL and
    OpenRLHF compute. ``clipped_policy_loss`` with ratio_level="sequence" has the same value and the gradient of
    GSPO-token (eq. 13 and 14), where each token has the slope of its own term; verl computes that. The two are equal
    where all tokens of a sequence have the same advantage and the same weight in the loss.

    Args:
        logprobs: (B, T), float. The only input with a gradient.
        old_logprobs: same shape; log-probs of the policy that sampled. None: it is this policy.
        advantages: same shape; positive for tokens of sequences that were better than expected.
        mask: same shape, bool or 0/1, 1 = counts. Masked tokens are not read and get gradient 0.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        clip_low, clip_high: as in ``clipped_policy_loss``; the defaults are the paper's.
        dual_clip, aggregation, num_items: as in ``clipped_policy_loss``.

    Returns:
        ``PolicyLoss``, float32 (float64 when an input is), all 0 when nothing is live. Its statistics are those of the
        sequence's ratio, approx_kl included.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ, or are not (B, T); an argument outside the ranges above.
    """
    op = "gspo_loss"
    check_sequences(op, logprobs)
    given = checked_tokens(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    log_ratio = given.logprobs - given.old_logprobs  # 0 at masked tokens
    mean = (ordered_sum(log_ratio) / lengths(given)).unsqueeze(-1).expand(logprobs.shape)
    return clipped_policy_loss(
        mean, torch.zeros_like(mean), given.advantages, given.live, clip_low=clip_low, clip_high=clip_high,
        dual_clip=dual_clip, aggregation=aggregation, num_items=num_items,
    )  # fmt: skip


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> PolicyLoss:
    """-sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprob per token, aggregated (CISPO, arXiv 2506.13585).

    The clipped ratio is a constant weight, so that no token loses its gradient. The log ratio is bounded to +-20. A
    live -inf in ``logprobs`` gives an infinite loss.

    Args:
        logprobs, old_logprobs, advantages, mask, aggregation, num_items: as in ``clipped_policy_loss``.
        clip_low, clip_high: bounds of the weight below and above 1; 0 <= clip_low <= 1, clip_high >= 0. The defaults
            bound it by 5 from above alone, as ScaleRL does (arXiv 2510.13786); TRL's epsilon_high is 1 + clip_high.

    Returns:
        ``PolicyLoss``, float32 (float64 when an input is), all 0 when nothing is live. clip_fraction is the share of
        tokens whose weight is clipped.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges above.
    """
    op = "cispo_loss"
    _checks.within(op, 0, 1, clip_low=clip_low)
    _checks.non_negative(op, clip_high=clip_high)
    given = checked_tokens(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    ratio = torch.exp(bounded_log_ratio(given.logprobs.detach() - given.old_logprobs))
    weights = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -weights * given.advantages * given.logprobs
    return with_statistics(given, loss, weights != ratio, aggregation, num_items)


def sapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    aggregation: str = "seq-mean-token-mean",
    num_items: float | Tensor | None = None,
) -> PolicyLoss:
    """-A 4 / t sigmoid(t (r - 1)) per token, aggregated: a gate instead of a clip (SAPO, arXiv 2511.20347).

    At r = 1 it has the slope of the plain policy loss, -A r; away from 1 the slope falls off smoothly. The log ratio is
    bounded to +-20, as in ``clipped_policy_loss``.

    Args:
        logprobs, old_logprobs, advantages, mask, aggregation, num_items: as in ``clipped_policy_loss``.
        temperature_positive, temperature_negative: t of tokens with a positive advantage, and of all others; > 0, at
            most 64.

    Returns:
        ``PolicyLoss``, float32 (float64 when an input is), all 0 when nothing is live; clip_fraction is 0.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges above.
    """
    op = "sapo_loss"
    for name, value in (("positive", temperature_positive), ("negative", temperature_negative)):
        _checks.positive(op, **{f"temperature_{name}": value})
        _checks.within(op, 0, 64, **{f"temperature_{name}": value})  # e^64 is finite in float32
    given = checked_tokens(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    ratio = torch.exp(bounded_log_ratio(given.logprobs - given.old_logprobs))
    temperature = torch.where(given.advantages > 0, temperature_positive, temperature_negative).to(ratio.dtype)
    # the logistic function by exp: torch.sigmoid gives other bits at other places of a tensor
    loss = -given.advantages * (4 / temperature) / (1 + torch.exp(-temperature * (ratio - 1)))
    return with_statistics(given, loss, torch.zeros_like(loss, dtype=torch.bool), aggregation, num_items)


def vespo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> PolicyLoss:
    """-sg[w^k e^(lambda (1 - w))] A logprob per token, aggregated, with w the ratio of the whole sequence (VESPO,
    arXiv 2602.10693).

    w is the product of the ratios of the sequence's live tokens, not their mean. Its weight is 1 at w = 1, largest at
    w = k / lambda, and falls to 0 on both sides. The log ratios of a token and of the sequence are bounded to +-20.
    For rollouts of another engine subtract the logarithm of a weight per token from ``old_logprobs``.

    Args:
        logprobs: (B, T), float. The only input with a gradient.
        old_logprobs, advantages, mask, aggregation, num_items: as in ``clipped_policy_loss``.
        k_positive, lambda_positive: of tokens with an advantage >= 0; >= 0. The defaults are TRL's.
        k_negative, lambda_negative: of tokens with a negative advantage; >= 0.

    Returns:
        ``PolicyLoss``, float32 (float64 when an input is), all 0 when nothing is live; clip_fraction is 0, and the
        ratios are those of tokens.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ, or are not (B, T); an argument outside the ranges above.
    """
    op = "vespo_loss"
    _checks.non_negative(
        op, k_positive=k_positive, lambda_positive=lambda_positive, k_negative=k_negative,
        lambda_negative=lambda_negative,
    )  # fmt: skip
    check_sequences(op, logprobs)
    given = checked_tokens(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    log_ratio = bounded_log_ratio(given.logprobs.detach() - given.old_logprobs)
    log_w = bounded_log_ratio(ordered_sum(log_ratio)).unsqueeze(-1)
    positive = given.advantages >= 0
    k = torch.where(positive, k_positive, k_negative).to(log_w.dtype)
    decay = torch.where(positive, lambda_positive, lambda_negative).to(log_w.dtype)
    weights = torch.exp(k * log_w - decay * torch.expm1(log_w))
    loss = -weights * given.advantages * given.logprobs
    return with_statistics(given, loss, torch.zeros_like(loss, dtype=torch.bool), aggregation, num_items)


def gmpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    num_items: float | Tensor | None = None,
) -> PolicyLoss:
    """-A exp(mean of the clipped log ratios) per sequence, averaged over sequences (GMPO, arXiv 2507.20673;
    verl's geo_mean).

    A token's log ratio is clipped on the side to which its advantage pushes it: from above at clip_high where A > 0,
    from below at -clip_low elsewhere. A clipped token has no gradient; the others share that of the sequence equally.

    Args:
        logprobs: (B, T), float. The only input with a gradient.
        old_logprobs, mask: as in ``clipped_policy_loss``.
        advantages: same shape, as a rule one number a sequence at each of its tokens; of several, A is the mean.
        clip_low, clip_high: bounds of a token's log ratio, >= 0. The defaults are the paper's.
        num_items: replaces the number of sequences with a live token as the divisor, as in ``aggregate``.

    Returns:
        ``PolicyLoss``, float32 (float64 when an input is), all 0 when nothing is live. clip_fraction is the share of
        tokens whose log ratio is clipped.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ, or are not (B, T); an argument outside the ranges above.
    """
    op = "gmpo_loss"
    _checks.non_negative(op, clip_low=clip_low, clip_high=clip_high)
    check_sequences(op, logprobs)
    aggregation = "seq-mean-token-mean"
    given = checked_tokens(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    log_ratio = bounded_log_ratio(given.logprobs - given.old_logprobs)
    above = (given.advantages > 0) & (log_ratio > clip_high)
    below = (given.advantages <= 0) & (log_ratio < -clip_low)
    bounded = torch.where(below, -clip_low, torch.where(above, clip_high, log_ratio))
    count = lengths(given)
    ratio = torch.exp(ordered_sum(bounded) / count)
    loss = -ordered_sum(given.advantages) / count * ratio
    # the same at each of its tokens, so that their mean is the sequence's own
    return with_statistics(given, loss.unsqueeze(-1).expand(logprobs.shape), above | below, aggregation, num_items)


def gpg_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """-A logprob per token, aggregated: the policy gradient without a ratio (REINFORCE; GPG, arXiv 2504.02546).

    ``clipped_policy_loss`` with old_logprobs=None has the same gradient, another value (-A) and statistics.

    Args:
        logprobs: (B, T), or any shape with token-mean; float. The only input with a gradient.
        advantages: same shape; positive for tokens that were better than expected; a constant.
        mask, aggregation, num_items: as in ``aggregate``.

    Returns:
        0-dim, float32 (float64 when an input is); 0 with zero gradient when nothing is live.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges of ``aggregate``.
    """
    given = checked_tokens("gpg_loss", logprobs, None, advantages, mask, aggregation, num_items)
    return reduced(-given.advantages * given.logprobs, given.live, aggregation=aggregation, num_items=num_items)
