"""Weights that correct for rollouts of another engine, or of an older policy."""

import math

import torch
from torch import Tensor

from . import _checks
from ._aggregate import ordered_sum, upcast
from .clipped_policy_loss import bounded_log_ratio

LEVELS = ("token", "sequence", "sequence-mean")


def truncated_importance_weights(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    level: str = "token",
    outside: str = "clip",
    low: float = 0.0,
    high: float = 2.0,
) -> Tensor:
    """The ratios of the trainer's probabilities to the sampler's, within [low, high]: factors for the advantages.

    | correction             | arguments                          | source                                          |
    |------------------------|------------------------------------|-------------------------------------------------|
    | truncated (TIS)        | outside="clip"                     | Yao et al., "Your efficient RL framework        |
    |                        |                                    | secretly brings you off-policy RL training"     |
    | two-sided (IcePop)     | outside="zero", low=0.5, high=5.0  | arXiv 2510.18855                                |
    | masked sequences (MIS) | outside="zero", level="sequence"   | Liu et al., "When speed kills stability"        |

    The log ratio is bounded to +-20. A weight >= 0 on the advantage is the same weight on a token's policy loss,
    clipped or not: max(-w A r, -w A clip(r)) = w max(-A r, -A clip(r)).

    Args:
        logprobs: (B, T), or any shape for level "token"; float; log-probs that the trainer computes for the sampled
            tokens before the update.
        rollout_logprobs: same shape; log-probs that the sampler returned.
        mask: same shape, bool or 0/1, 1 = counts. Masked tokens are not read.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        level: "token": each token has its own ratio. "sequence": the product of the ratios of the sequence's live
            tokens, at each of them. "sequence-mean": their geometric mean.
        outside: "clip" moves a ratio outside of [low, high] to the nearer bound; "zero" drops it.
        low, high: 0 <= low <= high; high may be infinite.

    Returns:
        Same shape, >= 0, 0 at masked tokens; float32 (float64 when an input is), without gradient. NaN for a live NaN,
        and for -inf in both.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges above.
    """
    op = "truncated_importance_weights"
    _checks.alike(op, "that of logprobs", logprobs=logprobs, rollout_logprobs=rollout_logprobs)
    _checks.one_of(op, "level", level, LEVELS)
    _checks.one_of(op, "outside", outside, ("clip", "zero"))
    _checks.is_number(op, low=low, high=high)
    if not 0 <= low <= high or low == math.inf:
        raise ValueError(f"{op}: low and high must be 0 <= low <= high, low finite; got {low!r} and {high!r}")
    if level != "token" and logprobs.dim() != 2:
        raise ValueError(f"{op}: level {level!r} needs (B, T), one row a sequence; got shape {tuple(logprobs.shape)}")
    live = _checks.live_mask(op, mask, logprobs.shape, logprobs.device)

    logprobs, rollout_logprobs = upcast(logprobs.detach(), rollout_logprobs.detach())
    log_ratio = logprobs - rollout_logprobs
    if live is not None:
        log_ratio = torch.where(live, log_ratio, 0.0)
    if level != "token":
        total = ordered_sum(log_ratio).unsqueeze(-1)
        if level == "sequence-mean":
            total = total / (logprobs.shape[1] if live is None else live.sum(-1, keepdim=True).clamp(min=1))
        log_ratio = total.expand(logprobs.shape)
    ratio = torch.exp(bounded_log_ratio(log_ratio))
    below, above = ratio < low, ratio > high
    weights = torch.where(below, low if outside == "clip" else 0.0, ratio)
    weights = torch.where(above, high if outside == "clip" else 0.0, weights)
    return weights if live is None else torch.where(live, weights, 0.0)
