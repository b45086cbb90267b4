"""KL estimates of tokens that an older policy sampled."""

import torch
from torch import Tensor

from . import _checks
from ._aggregate import upcast
from .clipped_policy_loss import bounded_log_ratio
from .token_kl import token_kl

WEIGHTED = ("k1", "k2", "k3")


def importance_weighted_kl(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    estimator: str = "k3",
    max_ratio: float | None = None,
    max_kl: float | None = None,
) -> Tensor:
    """r times ``token_kl`` per token, r = exp(logprobs - old_logprobs): unbiased for tokens of the old policy
    (DeepSeek-V3.2, arXiv 2512.02556; TRL's use_bias_correction_kl).

    The gradient goes through both factors. For k3 it is r d, with d = logprobs - ref_logprobs, whose expectation is the
    gradient of KL(policy || reference); that of k1 has the same expectation. So no straight-through form is needed.

    Args:
        logprobs: of the policy, any shape, float. The only input with a gradient.
        old_logprobs: same shape; of the policy that sampled; a constant. The log ratio is bounded to +-20.
        ref_logprobs: same shape; of the reference; a constant.
        mask: same shape, bool or 0/1, 1 = counts. Masked tokens are not read; their output and gradient are 0.
        estimator: "k1", "k2" or "k3", as in ``token_kl``.
        max_ratio: bounds r from above, > 0; beyond it r is a constant. None: no bound.
        max_kl: bounds the estimate to +-max_kl before it is weighted, > 0; beyond it the estimate is a constant. None:
            no bound.

    Returns:
        Same shape; float32, or float64 when an input is float64. Add ``kl_coef * aggregate(it, mask, ...)`` to a loss.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges above.
    """
    op = "importance_weighted_kl"
    _checks.alike(
        op, "that of logprobs", logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs
    )  # fmt: skip
    _checks.one_of(op, "estimator", estimator, WEIGHTED)
    _checks.positive(op, max_ratio=max_ratio, max_kl=max_kl)
    live = _checks.live_mask(op, mask, logprobs.shape, logprobs.device)
    logprobs, old_logprobs, ref_logprobs = upcast(logprobs, _checks.constant(old_logprobs), ref_logprobs)
    kl = token_kl(logprobs, ref_logprobs, live, estimator=estimator)
    if max_kl is not None:  # not clamp, which gives NaN the gradient 0
        kl = torch.where(kl > max_kl, max_kl, torch.where(kl < -max_kl, -max_kl, kl))
    log_ratio = logprobs - old_logprobs
    ratio = torch.exp(bounded_log_ratio(log_ratio if live is None else torch.where(live, log_ratio, 0.0)))
    if max_ratio is not None:
        ratio = torch.where(ratio > max_ratio, max_ratio, ratio)
    return ratio * kl
