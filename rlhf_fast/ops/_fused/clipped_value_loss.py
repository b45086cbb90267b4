"""clipped_value_loss on fused kernels: loss, gradient and statistic in one sweep."""

import math
from typing import Any

from torch import Tensor

from .._dispatch import implements
from .._launch import launch
from ..clipped_value_loss import ValueLoss
from ._loss import data_arguments, divisor, empty_outputs, gradient, result_arguments, save, wants_gradient
from ._op import fused_op


@implements("clipped_value_loss", "native", "triton", "cuda")
def fused(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    live: Tensor | None,
    clip: float | None,
    aggregation: str,
    num_items: float | Tensor | None,
) -> ValueLoss:
    bound = math.inf if clip is None else clip
    rest = divisor(aggregation, num_items, values)
    loss, statistics, _ = _forward(values, old_values, returns, live, bound, *rest, wants_gradient(values))
    return ValueLoss(loss, *statistics.unbind()[:-1])


def _kernel(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    live: Tensor | None,
    clip: float,
    aggregation: int,
    num_items: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = loss, statistics, grads = empty_outputs(values, 2, int(with_gradient))
    launch(
        "clipped_value_loss",
        *data_arguments(values, old_values, returns, live),
        clip,
        *result_arguments(aggregation, num_items, loss, statistics, grads[0] if with_gradient else None),
    )
    return outputs


def _fake(values: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(values, 2, int(rest[-1]))


_forward = fused_op("clipped_value_loss", _kernel, _fake, save=save, gradient=gradient)
