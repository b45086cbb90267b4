"""clipped_policy_loss on fused kernels: loss, gradient and statistics in one sweep."""

import math
from typing import Any

from torch import Tensor

from .._dispatch import implements
from .._launch import launch
from ..clipped_policy_loss import PolicyLoss
from ._loss import data_arguments, divisor, empty_outputs, gradient, result_arguments, save, wants_gradient
from ._op import fused_op


@implements("clipped_policy_loss", "native", "triton", "cuda")
def fused(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    live: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_level: str,
    aggregation: str,
    num_items: float | Tensor | None,
) -> PolicyLoss:
    loss, statistics, _ = _forward(
        logprobs,
        old_logprobs,
        advantages,
        live,
        clip_low,
        clip_high,
        math.inf if dual_clip is None else dual_clip,
        ratio_level == "sequence",
        *divisor(aggregation, num_items, logprobs),
        wants_gradient(logprobs),
    )
    return PolicyLoss(loss, *statistics.unbind()[:-1])


def _kernel(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    live: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    sequence_level: bool,
    aggregation: int,
    num_items: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = loss, statistics, grads = empty_outputs(logprobs, 6, int(with_gradient))
    launch(
        "clipped_policy_loss",
        *data_arguments(logprobs, old_logprobs, advantages, live),
        clip_low,
        clip_high,
        dual_clip,
        sequence_level,
        *result_arguments(aggregation, num_items, loss, statistics, grads[0] if with_gradient else None),
    )
    return outputs


def _fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(logprobs, 6, int(rest[-1]))


_forward = fused_op("clipped_policy_loss", _kernel, _fake, save=save, gradient=gradient)
