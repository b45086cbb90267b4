"""Root-mean-square norm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019)."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._aggregate import ordered_sum
from ._dispatch import implementation, implements, launch
from ._op import fused_op
from ._rows import accumulation_dtype, dtype_code, flat_rows, hidden_of


def rms_norm(hidden: Tensor, weight: Tensor | None, *, eps: float, offset: float = 0.0) -> Tensor:
    """(offset + weight) * x / sqrt(mean(x^2) + eps), x a row of ``hidden``.

    Computed in float32 and rounded once, to the dtype of ``hidden``, like Gemma's norm in transformers (``offset=1``).
    transformers' Llama norm rounds x / sqrt(...) to the dtype before it multiplies by the weight; this function differs
    from it by that rounding and is closer to the formula.

    Args:
        hidden: (..., H), float. Differentiable.
        weight: (H,), float of any dtype; None = 1. Differentiable; its gradient is summed in float32, in an order that
            does not depend on the number of threads.
        eps: added to the mean square, at least 0.
        offset: added to the weight, in float32: 1 for Gemma, which stores weight - 1.

    Returns:
        Shape and dtype of ``hidden``, inside autocast too. A row with NaN or inf gives NaN in that row only.

    Raises:
        TypeError: an input is not a floating-point tensor, or ``eps`` or ``offset`` is not a number.
        ValueError: the weight's shape or device differs; eps is negative or infinite; an offset without a weight.
    """
    _checks.floating("rms_norm", hidden=hidden)
    _checks.non_negative("rms_norm", eps=eps)
    _checks.is_number("rms_norm", offset=offset)
    if hidden.dim() == 0:
        raise ValueError("rms_norm: hidden must have shape (..., H); got a tensor without dimensions")
    if weight is not None:
        _checks.floating("rms_norm", weight=weight)
        _checks.shaped("rms_norm", hidden.shape[-1:], "one weight a column", weight=weight)
        _checks.same_device("rms_norm", hidden=hidden, weight=weight)
        weight = weight.to(accumulation_dtype(hidden.dtype))
        if offset != 0:
            weight = weight + offset
    elif offset != 0:
        raise ValueError(f"rms_norm: offset is added to the weight; got offset={offset} and no weight")
    return implementation("rms_norm", hidden)(Inputs(hidden, weight, eps))


class Inputs(NamedTuple):
    hidden: Tensor  # (..., H)
    weight: Tensor | None  # (H,), float32 (float64 for float64 hidden)
    eps: float


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("rms_norm", "torch")
def _torch(inputs: Inputs) -> Tensor:
    hidden = inputs.hidden
    x = flat_rows(hidden).to(accumulation_dtype(hidden.dtype))
    rows, width = x.shape
    normed = x * _Spread.apply(torch.rsqrt(ordered_sum(x * x) / width + inputs.eps), width)
    if inputs.weight is not None:
        normed = normed * _Spread.apply(inputs.weight, rows).t()
    return normed.to(hidden.dtype).reshape(hidden.shape)


class _Spread(torch.autograd.Function):
    """(N,) -> (N, M), like broadcasting, but with a backward whose sum does not depend on threads or strides."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, count: int) -> Tensor:
        return values.unsqueeze(1).repeat(1, count)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ordered_sum(grads[0]), None


# ---- on the engines: one pass forward, one backward -----------------------------------------------------------------


def _kernel(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> normed (..., H), and 1 / sqrt(mean(x^2) + eps) of every row (N,)."""
    rows = flat_rows(inputs.hidden)
    normed, scale = _outputs(inputs)
    launch(
        records.RmsNorm(
            tokens=rows.shape[0],
            width=rows.shape[1],
            dtype=dtype_code(rows),
            hidden=hidden_of(rows),
            weight=None if inputs.weight is None else inputs.weight.contiguous(),
            eps=inputs.eps,
            normed=hidden_of(flat_rows(normed)),
            scale=scale,
        ),
        normed,
    )
    return normed, scale


def _outputs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    hidden = inputs.hidden
    return hidden.new_empty(hidden.shape), hidden.new_empty(math.prod(hidden.shape[:-1]), dtype=torch.float32)


class _Backward(NamedTuple):
    grad_normed: Tensor
    hidden: Tensor
    weight: Tensor | None
    scale: Tensor
    wants_hidden: bool
    wants_weight: bool


def _backward_kernel(inputs: _Backward) -> tuple[Tensor, Tensor]:
    """-> the gradients of hidden and weight, each empty where it is not wanted."""
    rows = flat_rows(inputs.hidden)
    grad_hidden, grad_weight = _gradients(inputs)
    launch(
        records.RmsNormBackward(
            tokens=rows.shape[0],
            width=rows.shape[1],
            dtype=dtype_code(rows),
            hidden=hidden_of(rows),
            weight=None if inputs.weight is None else inputs.weight.contiguous(),
            scale=inputs.scale,
            grad_normed=hidden_of(flat_rows(inputs.grad_normed)),
            grad_hidden=hidden_of(flat_rows(grad_hidden) if inputs.wants_hidden else None),
            grad_weight=grad_weight if inputs.wants_weight else None,
        ),
        grad_hidden,
    )
    return grad_hidden, grad_weight


def _gradients(inputs: _Backward) -> tuple[Tensor, Tensor]:
    hidden = inputs.hidden
    width = hidden.shape[-1] if inputs.wants_weight else 0
    return (
        hidden.new_empty(hidden.shape if inputs.wants_hidden else (0,)),
        hidden.new_empty(width, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: Inputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs.hidden, inputs.weight, output[1])


def _gradient(ctx: Any, grad_normed: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
    hidden, weight, scale = ctx.saved_tensors
    wants_hidden, wants_weight = ctx.needs
    grads = _backward(_Backward(grad_normed, hidden, weight, scale, wants_hidden, wants_weight))
    return grads[0] if wants_hidden else None, grads[1] if wants_weight else None


_backward = fused_op("rms_norm_backward", _Backward, _backward_kernel, _gradients)
_forward = fused_op("rms_norm", Inputs, _kernel, _outputs, trained=("hidden", "weight"), save=_save, gradient=_gradient)


@implements("rms_norm", "fused")
def _fused(inputs: Inputs) -> Tensor:
    return _forward(inputs)[0]
