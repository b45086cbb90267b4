"""Policy losses that are no clipped loss of a token: GSPO, CISPO and SAPO. Each is composed of public parts."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._aggregate import check_aggregation, masked_mean, ordered_sum, reduced, upcast
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
    if isinstance(logprobs, Tensor) and logprobs.dim() != 2:
        raise ValueError(f"{op}: logprobs must have shape (B, T), one row a sequence; got {tuple(logprobs.shape)}")
    given = _checked(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    log_ratio = _live(given.live, given.logprobs - given.old_logprobs)
    length = logprobs.shape[1] if given.live is None else given.live.sum(-1).clamp(min=1)
    mean = (ordered_sum(log_ratio) / length).unsqueeze(-1).expand(logprobs.shape)
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
    given = _checked(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    ratio = torch.exp(bounded_log_ratio(given.logprobs.detach() - given.old_logprobs))
    weights = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -weights * given.advantages * given.logprobs
    return _with_statistics(given, loss, weights != ratio, aggregation, num_items)


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
    given = _checked(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    ratio = torch.exp(bounded_log_ratio(given.logprobs - given.old_logprobs))
    temperature = torch.where(given.advantages > 0, temperature_positive, temperature_negative).to(ratio.dtype)
    # the logistic function by exp: torch.sigmoid gives other bits at other places of a tensor
    loss = -given.advantages * (4 / temperature) / (1 + torch.exp(-temperature * (ratio - 1)))
    return _with_statistics(given, loss, torch.zeros_like(loss, dtype=torch.bool), aggregation, num_items)


class _Tokens(NamedTuple):
    """Checked inputs of one dtype; masked entries of the three are 0, and their gradient too."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    live: Tensor | None


def _checked(
    op: str,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    aggregation: str,
    num_items: float | Tensor | None,
) -> _Tokens:
    if old_logprobs is None:
        old_logprobs = logprobs
    _checks.alike(op, "that of logprobs", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_aggregation(op, logprobs, aggregation, num_items)
    live = _checks.live_mask(op, mask, logprobs.shape, logprobs.device)
    given = upcast(logprobs, _checks.constant(old_logprobs), _checks.constant(advantages))
    logprobs, old_logprobs, advantages = (_live(live, tensor) for tensor in given)
    return _Tokens(logprobs, old_logprobs, advantages, live)


def _live(live: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if live is None else torch.where(live, tensor, 0.0)


def _with_statistics(
    given: _Tokens, losses: Tensor, clipped: Tensor, aggregation: str, num_items: float | Tensor | None
) -> PolicyLoss:
    measured = clipped_policy_loss(given.logprobs.detach(), given.old_logprobs, given.advantages, given.live)
    return measured._replace(
        loss=reduced(losses, given.live, aggregation=aggregation, num_items=num_items),
        clip_fraction=masked_mean(clipped.to(losses.dtype), given.live),
    )
