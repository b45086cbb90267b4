"""linear_cross_entropy on fused kernels. A mean or a sum knows each token's weight before the sweep, so that every
gradient, those of a trained head included, is formed in it: two matrix products with a frozen head, three otherwise.
"""

from typing import Any

import torch
from torch import Tensor

from .._aggregate import aggregate, token_weights
from .._dispatch import implements
from .._launch import launch
from .._linear import LoRA
from ._linear import LinearHead, empty_gradients, flat_head, scaled, sweep, wanted, wanted_dtypes
from ._live import LiveRows
from ._op import fused_op
from ._rows import logits_arguments
from .linear_logprobs import fused as linear_logprobs


@implements("linear_cross_entropy", "native", "triton", "cuda")
def fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float | None,
    reduction: str,
    num_items: float | Tensor | None,
) -> Tensor:
    if reduction == "none":
        return -linear_logprobs(hidden, weight, bias, lora, targets, live, temperature, softcap, False)[0]
    head = flat_head(weight, bias, lora)
    divisor = 1.0 if reduction == "sum" else num_items
    weights = token_weights(live, aggregation="token-mean", num_items=divisor)
    return _forward(hidden, *head, targets, live, temperature, softcap or 0.0, weights, wanted(hidden, head))[0]


def _kernel(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float,
    weights: Tensor,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the sum of weights (N,) * losses, and its gradients in the order of HeadGradients."""
    rows = LiveRows(live, targets, temperature, softcap)
    slopes = -rows.take(weights)
    logprobs = hidden.new_empty(rows.count, dtype=torch.float32)

    def fold(part: slice, logits: tuple[Tensor, ...], grad: Tensor | None) -> None:
        arguments = rows.arguments(part, logits[0])
        launch("linear_logprobs", *arguments, logprobs[part], None, *logits_arguments(grad), slopes[part], None)

    grads = sweep(LinearHead(weight, bias, down, up, scale), (rows.take(hidden),), fold, wants)
    loss = aggregate(slopes * logprobs, None, aggregation="token-mean", num_items=1.0)
    return loss, rows.put(grads.hidden) if wants[0] else grads.hidden, *grads[1:]


def _fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return hidden.new_empty((), dtype=torch.float32), *empty_gradients(hidden, LinearHead(*rest[:5]), rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, *head = inputs[:6]
    ctx.dtypes = wanted_dtypes(hidden, LinearHead(*head), inputs[-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *scaled(grad_loss, ctx.saved_tensors, ctx.dtypes), *(None,) * 7


_forward = fused_op("linear_cross_entropy", _kernel, _fake, save=_save, gradient=_gradient)
