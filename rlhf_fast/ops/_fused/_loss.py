"""What the clipped losses have in common: one kernel gives the loss, its statistics and, where wanted, its gradient."""

from typing import Any

import torch
from torch import Tensor

from .._aggregate import AGGREGATIONS, scalar_tensor


def wants_gradient(data: Tensor) -> bool:
    return torch.is_grad_enabled() and data.requires_grad


def divisor(aggregation: str, num_items: float | Tensor | None, data: Tensor) -> tuple[int, Tensor | None]:
    """aggregation and num_items as the custom ops take them."""
    return AGGREGATIONS.index(aggregation), scalar_tensor(num_items, data.device)


def data_arguments(*data: Tensor, live: Tensor | None) -> tuple[object, ...]:
    """The launchers' leading arguments, of (B, T) tensors."""
    return *data[0].shape, *(tensor.contiguous() for tensor in data), None if live is None else live.contiguous()


def result_arguments(
    aggregation: int, num_items: Tensor | None, outputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[object, ...]:
    """The launchers' last arguments. A num_items below 0 stands for none, so that a given one becomes 0 at least."""
    loss, statistics, grad = outputs
    items: float | Tensor = -1.0
    if num_items is not None:  # on a GPU its value stays there
        items = num_items if num_items.is_cuda else max(float(num_items), 0.0)
    return aggregation, items, loss, statistics, grad if grad.dim() == 2 else None, torch.get_num_threads()


def empty_outputs(data: Tensor, statistics: int, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """loss (), statistics (n,) and d loss / d data (B, T), or (0,) where it is not wanted."""
    return data.new_empty(()), data.new_empty(statistics), data.new_empty(data.shape if with_gradient else 0)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def gradient(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return None if grad_loss is None else grad * grad_loss, *(None,) * (len(ctx.needs_input_grad) - 1)
