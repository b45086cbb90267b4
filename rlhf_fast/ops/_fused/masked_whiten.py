"""masked_whiten on fused kernels: two passes for the statistics, in float64, and one for the result."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .._dispatch import implements
from .._launch import launch
from ..masked_whiten import EPSILON
from ._op import fused_op


@implements("masked_whiten", "native", "triton", "cuda")
def fused(
    x: Tensor,
    live: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    group: "torch.distributed.ProcessGroup | None",
) -> Tensor:
    statistics = None if group is None else _statistics_over_ranks(x, live, unbiased, group)
    return _forward(x, live, shift_mean, unbiased, statistics)[0]


def _statistics_over_ranks(
    x: Tensor, live: Tensor | None, unbiased: bool, group: "torch.distributed.ProcessGroup"
) -> Tensor:
    moments = _moments(x, live, None)
    torch.distributed.all_reduce(moments, group=group)
    count, total = moments.unbind()
    mean = total / count.clamp(min=1)
    deviations = _moments(x, live, mean)
    torch.distributed.all_reduce(deviations, group=group)
    variance = deviations[1] / (count - 1 if unbiased else count).clamp(min=1)
    return torch.stack((count, mean, torch.rsqrt(variance + EPSILON)))


def _moments_kernel(x: Tensor, live: Tensor | None, mean: Tensor | None) -> Tensor:
    """-> (2,) float64: live elements, and their sum or, with a mean, that of the squared deviations from it."""
    moments = x.new_empty(2, dtype=torch.float64)
    launch("masked_moments", *_elements(x, live), mean, moments, torch.get_num_threads())
    return moments


_moments = fused_op("masked_moments", _moments_kernel, lambda x, live, mean: x.new_empty(2, dtype=torch.float64))


def _kernel(
    x: Tensor, live: Tensor | None, shift_mean: bool, unbiased: bool, statistics: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> whitened (N,), and the statistics (3,) float64 used: live elements, mean, scale."""
    given = statistics is not None
    used = statistics.clone() if statistics is not None else x.new_empty(3, dtype=torch.float64)
    whitened = x.new_empty(x.shape)
    threads = torch.get_num_threads()
    launch("masked_whiten", *_elements(x, live), shift_mean, unbiased, given, used, whitened, threads)
    return whitened, used


def _fake(
    x: Tensor, live: Tensor | None, shift_mean: bool, unbiased: bool, statistics: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(3, dtype=torch.float64)


def _backward_kernel(
    grad_whitened: Tensor, x: Tensor, live: Tensor | None, shift_mean: bool, unbiased: bool, statistics: Tensor
) -> Tensor:
    grad = x.new_empty(x.shape)
    launch(
        "masked_whiten_backward",
        *_elements(x, live),
        shift_mean,
        unbiased,
        statistics,
        grad_whitened.contiguous(),
        grad,
        torch.get_num_threads(),
    )
    return grad


_backward = fused_op("masked_whiten_backward", _backward_kernel, lambda grad_whitened, x, *_: x.new_empty(x.shape))


def _elements(x: Tensor, live: Tensor | None) -> tuple[object, ...]:
    """The launchers' leading arguments."""
    return x.shape[0], x.contiguous(), None if live is None else live.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, live, ctx.shift_mean, ctx.unbiased, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, live, output[1])


def _gradient(ctx: Any, grad_whitened: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, live, statistics = ctx.saved_tensors
    return _backward(grad_whitened, x, live, ctx.shift_mean, ctx.unbiased, statistics), None, None, None, None


_forward = fused_op("masked_whiten", _kernel, _fake, save=_save, gradient=_gradient)
