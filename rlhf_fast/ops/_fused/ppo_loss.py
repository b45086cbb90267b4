"""ppo_loss on fused kernels: loss, gradients and statistics in one sweep."""

import math
from typing import Any

from torch import Tensor

from .._dispatch import implements
from .._launch import launch
from ..ppo_loss import PPOLoss
from ._loss import data_arguments, divisor, empty_outputs, gradient, result_arguments, save, wants_gradient
from ._op import fused_op
from .token_kl import kl_codes


@implements("ppo_loss", "native", "triton", "cuda")
def fused(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    live: Tensor | None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    aggregation: str,
    num_items: float | Tensor | None,
) -> PPOLoss:
    loss, statistics, _ = _forward(
        logprobs,
        values,
        entropy,
        old_logprobs,
        advantages,
        old_values,
        returns,
        ref_logprobs,
        live,
        clip_low,
        clip_high,
        math.inf if dual_clip is None else dual_clip,
        math.inf if value_clip is None else value_clip,
        value_coef,
        entropy_coef,
        kl_coef,
        *kl_codes(kl_estimator),
        *divisor(aggregation, num_items, logprobs),
        [data is not None and wants_gradient(data) for data in (logprobs, values, entropy)],
    )
    return PPOLoss(loss, *statistics.unbind()[:-1])


def _kernel(
    logprobs: Tensor,
    values: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    old_values: Tensor,
    returns: Tensor,
    ref_logprobs: Tensor | None,
    live: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    value_clip: float,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    kl: int,
    kl_slope: int,
    aggregation: int,
    num_items: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``wants``: which of the first three inputs get a gradient."""
    outputs = loss, statistics, grads = empty_outputs(logprobs, len(PPOLoss._fields), sum(wants))
    rows = iter(grads)
    launch(
        "ppo_loss",
        *data_arguments(logprobs, old_logprobs, advantages, values, old_values, returns, entropy, ref_logprobs, live),
        clip_low,
        clip_high,
        dual_clip,
        value_clip,
        value_coef,
        entropy_coef,
        kl_coef,
        kl,
        kl_slope,
        *result_arguments(
            aggregation, num_items, loss, statistics, *[next(rows) if wanted else None for wanted in wants]
        ),
    )
    return outputs


def _fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(logprobs, len(PPOLoss._fields), sum(rest[-1]))


_forward = fused_op("ppo_loss", _kernel, _fake, save=save, gradient=gradient)
