"""verl's policy losses with verl's signatures; public in ``rlhf_fast.integrations.verl``.

Each takes log-probs, advantages and a mask (B, T), the aggregation and verl's config of the actor, and returns the loss
and the metrics that verl's own does. ``rollout_is_weights`` (B, T), >= 0, are factors of the tokens' losses.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import (
    PolicyLoss,
    aggregate,
    cispo_loss,
    clip_cov_loss,
    clip_fractions,
    clipped_policy_loss,
    dppo_loss,
    gmpo_loss,
    gpg_loss,
    kl_cov_loss,
    sapo_loss,
    token_kl,
)

LOG_RATIO_BOUND = 20.0
Metrics = dict[str, float]


def aggregation_of(
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> dict[str, Any]:
    """verl's arguments as ``aggregation`` and ``num_items``."""
    if mode == "token-sum":
        return {"aggregation": "token-mean", "num_items": 1 / dp_size}
    name, items = ("batch_num_tokens", batch_num_tokens)
    if mode != "token-mean":
        name, items = ("global_batch_size", global_batch_size)
    if items is None and dp_size > 1:
        raise ValueError(f"agg_loss: {name} is None and dp_size {dp_size}: expected the number of the whole batch")
    if items is not None:
        items = items / dp_size
    if mode == "seq-mean-token-sum-norm" and loss_scale_factor is not None:
        sequences = (mask != 0).any(-1).sum() if items is None else items
        return {"aggregation": "seq-mean-token-sum", "num_items": sequences * loss_scale_factor}
    return {"aggregation": mode, "num_items": items}


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the loss, the share of tokens clipped by the range, the mean of -(log ratio), the share clipped by c."""
    clips: dict[str, Any] = {
        "clip_low": cliprange if cliprange_low is None else cliprange_low,
        "clip_high": cliprange if cliprange_high is None else cliprange_high,
    }
    how = aggregation_of(response_mask, loss_agg_mode)
    result = clipped_policy_loss(
        log_prob, old_log_prob, advantages, response_mask, **clips, dual_clip=clip_ratio_c, **how
    )
    return result.loss, *_measured(log_prob, old_log_prob, advantages, response_mask, clips, clip_ratio_c)


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO with dual clip. Reads clip_ratio, clip_ratio_low, clip_ratio_high and clip_ratio_c of ``config``."""
    ceiling = config.get("clip_ratio_c", 3.0)
    clips = _clips(config)
    result = clipped_policy_loss(
        log_prob, old_log_prob, _weighted(advantages, rollout_is_weights), response_mask, **clips, dual_clip=ceiling,
        **aggregation_of(response_mask, loss_agg_mode, **config.global_batch_info),
    )  # fmt: skip
    clipped, kl, lower = _measured(log_prob, old_log_prob, advantages, response_mask, clips, ceiling)
    return result.loss, _metrics(clipped, kl, lower)


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GSPO with the gradient of GSPO-token, as verl's; ``gspo_loss`` has the gradient of the reported loss."""
    loss_of = _with(clipped_policy_loss, config, ratio_level="sequence", **_clips(config))
    return _variant(loss_of, log_prob, old_log_prob, advantages, response_mask, loss_agg_mode, rollout_is_weights)


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """CISPO. Reads clip_ratio, clip_ratio_low and clip_ratio_high of ``config``."""
    loss_of = _with(cispo_loss, config, **_clips(config))
    return _variant(loss_of, log_prob, old_log_prob, advantages, response_mask, loss_agg_mode, rollout_is_weights)


def compute_policy_loss_sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """SAPO. Reads tau_pos and tau_neg of ``config``; always a mean over sequences of token means, as in verl."""
    loss_of = _with(sapo_loss, config, temperature_positive=config.tau_pos, temperature_negative=config.tau_neg)
    mode = "seq-mean-token-mean"
    return _variant(loss_of, log_prob, old_log_prob, advantages, response_mask, mode, rollout_is_weights)


def compute_policy_loss_dppo_tv(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """DPPO by total variation. Reads clip_ratio, clip_ratio_low and clip_ratio_high of ``config`` as its bounds, and
    clip_ratio_c."""
    return _dppo("tv", log_prob, old_log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)


def compute_policy_loss_dppo_kl(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """DPPO by KL. Reads what ``compute_policy_loss_dppo_tv`` does."""
    return _dppo("kl", log_prob, old_log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)


def _dppo(
    divergence: str,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    mode: str,
    config: Any,
    weights: Tensor | None,
) -> tuple[Tensor, Metrics]:
    ceiling = config.get("clip_ratio_c", 20.0)
    loss_of = _with(dppo_loss, config, divergence=divergence, max_ratio=ceiling, **_clips(config))
    # the fractions of the advantages as they are: a weight of 0 would change the sign that counts
    measured = loss_of(log_prob.detach(), old_log_prob, advantages, mask, mode=mode)
    above = (mask != 0) & (log_prob.detach() - old_log_prob > math.log(ceiling))
    outside = loss_of(log_prob.detach(), old_log_prob, advantages, above, mode=mode).clip_fraction
    lower = aggregate(above.float(), mask) * (1 - outside)
    loss = loss_of(log_prob, old_log_prob, _weighted(advantages, weights), mask, mode=mode).loss
    return loss, _metrics(measured.clip_fraction, _mean_kl(log_prob, old_log_prob, mask), lower)


def compute_policy_loss_gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GPG. It has no metrics."""
    how = aggregation_of(response_mask, loss_agg_mode, **config.global_batch_info)
    return gpg_loss(log_prob, _weighted(advantages, rollout_is_weights), response_mask, **how), {}


def compute_policy_loss_clip_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Clip-Cov; as many tokens as verl's, but others by chance. Reads clip_ratio, clip_ratio_low and clip_ratio_high of
    ``config``, and clip_cov_ratio, clip_cov_lb and clip_cov_ub of its policy_loss."""
    options = config.policy_loss
    result = clip_cov_loss(
        log_prob, old_log_prob, advantages, response_mask, **_clips(config), weights=rollout_is_weights,
        cov_ratio=_or(options.clip_cov_ratio, 2e-4), cov_low=_or(options.clip_cov_lb, 1.0),
        cov_high=_or(options.clip_cov_ub, 5.0),
        **aggregation_of(response_mask, loss_agg_mode, **config.global_batch_info),
    )  # fmt: skip
    kl = _mean_kl(log_prob, old_log_prob, response_mask)
    return result.loss, {"actor/pg_clipfrac": result.clip_fraction.item(), "actor/ppo_kl": kl.item()}


def compute_policy_loss_kl_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """KL-Cov. Reads kl_cov_ratio and ppo_kl_coef of ``config``'s policy_loss."""
    options = config.policy_loss
    result = kl_cov_loss(
        log_prob, old_log_prob, advantages, response_mask, weights=rollout_is_weights,
        cov_ratio=_or(options.kl_cov_ratio, 2e-4), kl_coef=_or(options.ppo_kl_coef, 1.0),
        **aggregation_of(response_mask, loss_agg_mode, **config.global_batch_info),
    )  # fmt: skip
    distance = aggregate(token_kl(log_prob.detach(), old_log_prob, response_mask, estimator="abs"), response_mask)
    return result.loss, {"actor/ppo_kl": distance.item()}


def compute_policy_loss_geo_mean(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GMPO. Reads clip_ratio, clip_ratio_low and clip_ratio_high of ``config``. As in verl the loss is the mean over
    the sequences of this call, whatever the mode and the numbers of the whole batch."""
    clips = _clips(config)
    weighted = advantages
    if rollout_is_weights is not None:  # of a sequence: their geometric mean
        logs = torch.where(response_mask != 0, (rollout_is_weights + 1e-10).log(), 0.0)
        weighted = advantages * (logs.sum(-1) / response_mask.sum(-1).clamp(min=1)).exp().unsqueeze(-1)
    loss = gmpo_loss(log_prob, old_log_prob, weighted, response_mask, **clips, num_items=log_prob.shape[0]).loss
    log_ratio = log_prob.detach() - old_log_prob
    beyond = (log_ratio > clips["clip_high"]) | (log_ratio < -clips["clip_low"])
    high, low = (aggregate((beyond & side).float(), response_mask) for side in (advantages > 0, advantages < 0))
    return loss, _metrics(high, _mean_kl(log_prob, old_log_prob, response_mask), low)


def compute_policy_loss_dro(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GPG with a penalty on the squared log ratio. Reads dro_beta, > 0, of ``config``'s policy_loss."""
    beta = config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta must be > 0 for the policy loss dro; got {beta!r}")
    how = aggregation_of(response_mask, loss_agg_mode, **config.global_batch_info)
    gain = gpg_loss(log_prob, _weighted(advantages, rollout_is_weights), response_mask, **how)
    squares = token_kl(log_prob, old_log_prob, response_mask, estimator="k2")
    penalty = aggregate(squares, response_mask, weights=rollout_is_weights, **how)
    return gain + beta * penalty, {"actor/ppo_kl": _mean_kl(log_prob, old_log_prob, response_mask).item()}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _clips(config: Any) -> dict[str, Any]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return {
        "clip_low": config.clip_ratio if low is None else low,
        "clip_high": config.clip_ratio if high is None else high,
    }


def _with(loss: Callable[..., PolicyLoss], config: Any, **options: Any) -> Callable[..., PolicyLoss]:
    """The loss with these options, and with verl's numbers of the whole batch."""

    def of(*tokens: Tensor, mode: str) -> PolicyLoss:
        return loss(*tokens, **options, **aggregation_of(tokens[-1], mode, **config.global_batch_info))

    return of


def _variant(
    loss_of: Callable[..., PolicyLoss],
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    mode: str,
    weights: Tensor | None,
) -> tuple[Tensor, Metrics]:
    result = loss_of(log_prob, old_log_prob, _weighted(advantages, weights), mask, mode=mode)
    return result.loss, _metrics(result.clip_fraction, _mean_kl(log_prob, old_log_prob, mask), torch.zeros(()))


def _weighted(advantages: Tensor, weights: Tensor | None) -> Tensor:
    """A weight >= 0 of an advantage is the weight of its token's loss, clipped or not."""
    return advantages if weights is None else advantages * weights


def _mean_kl(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    """The mean of -(log ratio), bounded to +-20."""
    log_ratio = token_kl(log_prob.detach(), old_log_prob, mask).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return -aggregate(log_ratio, mask)


def _measured(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, mask: Tensor, clips: dict[str, Any], ceiling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """verl's statistics: the shares of tokens clipped by the range and by c, apart, and between them the mean KL."""
    found = clip_fractions(log_prob, old_log_prob, advantages, mask, **clips, dual_clip=ceiling)
    return found.low + found.high, _mean_kl(log_prob, old_log_prob, mask), found.dual


def _metrics(clipped: Tensor, kl: Tensor, lower: Tensor) -> Metrics:
    return {
        "actor/pg_clipfrac": clipped.item(),
        "actor/ppo_kl": kl.item(),
        "actor/pg_clipfrac_lower": lower.item(),
    }
