"""What PPO's losses have in common: one kernel gives the loss, its statistics and, where wanted, its gradients.

The last of the statistics is the scale: what the gradients are still to be multiplied by. A GPU's kernel learns the
divisor of the loss after it has written them.
"""

from typing import Any

import torch
from torch import Tensor

from .._aggregate import AGGREGATIONS, scalar_tensor


def wants_gradient(data: Tensor) -> bool:
    return torch.is_grad_enabled() and data.requires_grad


def divisor(aggregation: str, num_items: float | Tensor | None, data: Tensor) -> tuple[int, Tensor | None]:
    """aggregation and num_items as the custom ops take them."""
    return AGGREGATIONS.index(aggregation), scalar_tensor(num_items, data.device)


def data_arguments(data: Tensor, *rest: Tensor | None) -> tuple[object, ...]:
    """The launchers' leading arguments, of (B, T) tensors; the mask is the last."""
    return *data.shape, data.contiguous(), *[None if tensor is None else tensor.contiguous() for tensor in rest]


def result_arguments(
    aggregation: int, num_items: Tensor | None, loss: Tensor, statistics: Tensor, *grads: Tensor | None
) -> tuple[object, ...]:
    """The launchers' last arguments. A num_items below 0 stands for none, so that a given one becomes 0 at least."""
    items: float | Tensor = -1.0
    if num_items is not None:  # on a GPU its value stays there
        items = num_items.double() if num_items.is_cuda else max(float(num_items), 0.0)
    return aggregation, items, loss, statistics, *grads, torch.get_num_threads()


def empty_outputs(data: Tensor, statistics: int, gradients: int) -> tuple[Tensor, Tensor, Tensor]:
    """loss (), statistics (n,) and gradients (m, B, T)."""
    return data.new_empty(()), data.new_empty(statistics), data.new_empty((gradients, *data.shape))


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def gradient(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Of the inputs that need one, in their order."""
    needed = ctx.needs_input_grad
    if grad_loss is None:
        return (None,) * len(needed)
    statistics, grads = ctx.saved_tensors
    rows = iter(grads * (grad_loss * statistics[-1]))
    return tuple([next(rows) if need else None for need in needed])
