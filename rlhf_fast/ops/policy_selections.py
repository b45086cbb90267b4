"""Policy losses that treat some tokens apart: those outside a trust region, or of large covariance."""

import torch
from torch import Tensor

from . import _checks
from ._aggregate import masked_mean
from ._policy_tokens import Tokens, checked_tokens, checked_weights, with_statistics
from .clipped_policy_loss import PolicyLoss, bounded_log_ratio, clipped_policy_loss

DIVERGENCES = ("tv", "kl")
TINY = 1e-8  # of the other tokens' probability, so that its logarithm is finite


def dppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: str = "tv",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_ratio: float = 20.0,
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> PolicyLoss:
    """-sg[min(r, max_ratio)] A logprob per token, 0 outside a trust region; aggregated (DPPO, arXiv 2602.04879).

    A token is outside if its advantage pushes it further away from the old policy and the divergence of the two is
    above a bound. The divergence is that of the sampled token against all others together, with probabilities p under
    the policy and q under the old one:

    | divergence | value                                            |
    |------------|--------------------------------------------------|
    | tv         | abs(p - q), the total variation                  |
    | kl         | q log(q / p) + (1 - q) log((1 - q) / (1 - p))    |

    Args:
        logprobs, old_logprobs, advantages, mask, aggregation, num_items: as in ``clipped_policy_loss``; log-probs <= 0,
            of the distribution that was sampled from.
        divergence: a name of the table. For kl the bounds should be smaller, such as 0.05.
        clip_low, clip_high: the bounds where A <= 0 and p < q, and where A > 0 and p > q; >= 0.
        max_ratio: bound of the constant weight r, > 0.

    Returns:
        ``PolicyLoss``, float32 (float64 when an input is), all 0 when nothing is live. clip_fraction is the share of
        tokens outside.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges above.
    """
    op = "dppo_loss"
    _checks.one_of(op, "divergence", divergence, DIVERGENCES)
    _checks.non_negative(op, clip_low=clip_low, clip_high=clip_high)
    _checks.positive(op, max_ratio=max_ratio)
    given = checked_tokens(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    new, old = given.logprobs.detach(), given.old_logprobs
    rise = torch.exp(new) - torch.exp(old)
    distance = rise.abs() if divergence == "tv" else _binary_kl(old, new)
    outside = torch.where(given.advantages > 0, (rise > 0) & (distance > clip_high), (rise < 0) & (distance > clip_low))
    weights = torch.exp(bounded_log_ratio(new - old)).clamp(max=max_ratio)
    loss = torch.where(outside, 0.0, -weights * given.advantages * given.logprobs)
    return with_statistics(given, loss, outside, aggregation, num_items)


def _binary_kl(q: Tensor, p: Tensor) -> Tensor:
    """KL of (q, 1 - q) to (p, 1 - p) from log q and log p."""
    other_q, other_p = (-torch.expm1(each) for each in (q, p))
    return torch.exp(q) * (q - p) + other_q * torch.log((other_q + TINY) / (other_p + TINY))


def clip_cov_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cov_ratio: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    generator: torch.Generator | None = None,
    weights: Tensor | None = None,
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> PolicyLoss:
    """``clipped_policy_loss`` in which a few random tokens of large covariance are 0 (Clip-Cov, arXiv 2505.22617).

    The covariance of a token is (A - mean A) (logprob - mean logprob), with the means over this call's live tokens.
    Tokens with a large one lower the entropy most.

    Args:
        logprobs, old_logprobs, advantages, mask, clip_low, clip_high, aggregation, num_items: as in
            ``clipped_policy_loss``.
        cov_ratio: the share of live tokens to drop, at least one token, in (0, 1]; verl's clip_cov_ratio.
        cov_low, cov_high: only tokens whose covariance lies between the two, and which the ratio's clip leaves, are
            dropped; verl's clip_cov_lb and clip_cov_ub.
        generator: chooses the tokens, on the device of logprobs; None: torch's global one. torch.compile needs None.
        weights: same shape, float, >= 0; factors of the tokens' losses, which the covariance does not see; a constant.

    Returns:
        ``PolicyLoss``, float32 (float64 when an input is), all 0 when nothing is live. clip_fraction is the share of
        tokens dropped for their covariance, without those that the ratio's clip bounds. Dropped tokens stay in the
        divisor.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges above.
    """
    op = "clip_cov_loss"
    _check_share(op, cov_ratio)
    _checks.is_number(op, cov_low=cov_low, cov_high=cov_high)
    if not cov_low < cov_high:
        raise ValueError(f"{op}: cov_low must be below cov_high; got {cov_low!r} and {cov_high!r}")
    _checks.within(op, 0, 1, clip_low=clip_low)
    _checks.non_negative(op, clip_high=clip_high)
    given = checked_tokens(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    factors = checked_weights(op, weights, given)
    ratio = torch.exp(bounded_log_ratio(given.logprobs.detach() - given.old_logprobs))
    above, below = (given.advantages > 0) & (ratio > 1 + clip_high), (given.advantages < 0) & (ratio < 1 - clip_low)
    covariance = _covariance(given)
    able = (covariance > cov_low) & (covariance < cov_high) & ~(above | below)
    if given.live is not None:
        able = able & given.live
    chances = torch.rand(able.shape, generator=generator, device=able.device)
    dropped = able & _lowest(torch.where(able, chances, 2.0), _share(given, cov_ratio))
    advantages = torch.where(dropped, 0.0, given.advantages)
    result = clipped_policy_loss(
        given.logprobs, given.old_logprobs, advantages if factors is None else advantages * factors, given.live,
        clip_low=clip_low, clip_high=clip_high, aggregation=aggregation, num_items=num_items,
    )  # fmt: skip
    return result._replace(clip_fraction=masked_mean(dropped.to(ratio.dtype), given.live))


def kl_cov_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cov_ratio: float = 2e-4,
    kl_coef: float = 1.0,
    weights: Tensor | None = None,
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> PolicyLoss:
    """-A r per token, without a clip; plus kl_coef abs(log r) at the tokens of largest covariance; aggregated (KL-Cov,
    arXiv 2505.22617).

    The covariance is that of ``clip_cov_loss``. At r = 1, as in the first step of a rollout, the penalty's slope is 0.

    Args:
        logprobs, old_logprobs, advantages, mask, aggregation, num_items: as in ``clipped_policy_loss``.
        cov_ratio: the share of live tokens with the penalty, at least one token, in (0, 1]; verl's kl_cov_ratio.
        kl_coef: weight of the penalty, >= 0; verl's ppo_kl_coef.
        weights: same shape, float; factors of the tokens' losses, penalty included; a constant.

    Returns:
        ``PolicyLoss``, float32 (float64 when an input is), all 0 when nothing is live. clip_fraction is the share of
        tokens with the penalty.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges above.
    """
    op = "kl_cov_loss"
    _check_share(op, cov_ratio)
    _checks.non_negative(op, kl_coef=kl_coef)
    given = checked_tokens(op, logprobs, old_logprobs, advantages, mask, aggregation, num_items)
    factors = checked_weights(op, weights, given)
    keys = -_covariance(given)
    chosen = _lowest(keys if given.live is None else torch.where(given.live, keys, torch.inf), _share(given, cov_ratio))
    log_ratio = bounded_log_ratio(given.logprobs - given.old_logprobs)
    loss = -given.advantages * torch.exp(log_ratio) + kl_coef * torch.where(chosen, log_ratio.abs(), 0.0)
    return with_statistics(given, loss if factors is None else loss * factors, chosen, aggregation, num_items)


def _check_share(op: str, cov_ratio: float) -> None:
    _checks.positive(op, cov_ratio=cov_ratio)
    _checks.within(op, 0, 1, cov_ratio=cov_ratio)


def _covariance(given: Tokens) -> Tensor:
    advantages, logprobs = given.advantages, given.logprobs.detach()
    return (advantages - masked_mean(advantages, given.live)) * (logprobs - masked_mean(logprobs, given.live))


def _share(given: Tokens, part: float) -> Tensor | int:
    """The number of tokens in a share of the live ones, rounded down, at least 1; not read, so that no GPU waits."""
    if given.live is None:
        return max(int(given.logprobs.numel() * part), 1)
    return (given.live.sum().double() * part).floor().clamp(min=1)


def _lowest(keys: Tensor, count: Tensor | int) -> Tensor:
    """Whether each entry is among the ``count`` lowest; of equal ones the first are."""
    order = keys.flatten().argsort(stable=True)
    ranks = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))
    return (ranks < count).view(keys.shape)
