"""exact_kl on fused kernels: both sets of logits are read twice forward (on a CPU out of the cache), once backward."""

from typing import Any

import torch
from torch import Tensor

from .._dispatch import implements
from .._launch import launch
from .._native import dtype_code
from ._op import fused_op
from ._rows import STATISTICS, rows_arguments, unit_columns


@implements("exact_kl", "native", "triton", "cuda")
def fused(logits: Tensor, ref_logits: Tensor, live: Tensor, temperature: Tensor) -> Tensor:
    return _forward(unit_columns(logits), unit_columns(ref_logits), live, temperature)[0]


def _kernel(logits: Tensor, ref_logits: Tensor, live: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """-> KL (N,), statistics (N, 4)."""
    kl, statistics = _outputs(logits)
    launch("exact_kl", *_arguments(logits, ref_logits, live, temperature), kl, statistics)
    return kl, statistics


def _fake(logits: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return _outputs(logits)


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, STATISTICS, dtype=torch.float32)


def _arguments(logits: Tensor, ref_logits: Tensor, live: Tensor, temperature: Tensor) -> tuple[object, ...]:
    return (
        *rows_arguments(logits.shape[0], logits.shape[1], None, live, temperature, 0.0),
        logits,
        logits.stride(0),
        ref_logits,
        ref_logits.stride(0),
        dtype_code(logits.dtype),
    )


def _backward_kernel(
    logits: Tensor,
    ref_logits: Tensor,
    live: Tensor,
    temperature: Tensor,
    kl: Tensor,
    statistics: Tensor,
    grad_kl: Tensor,
) -> Tensor:
    """-> the gradient of the logits, contiguous."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(
        "exact_kl_backward",
        *_arguments(logits, ref_logits, live, temperature),
        statistics,
        kl,
        grad_kl.contiguous(),
        grad,
        grad.stride(0),
    )
    return grad


def _backward_fake(logits: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_backward = fused_op("exact_kl_backward", _backward_kernel, _backward_fake)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx: Any, grad_kl: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(*ctx.saved_tensors, grad_kl), None, None, None


_forward = fused_op("exact_kl", _kernel, _fake, save=_save, gradient=_gradient)
