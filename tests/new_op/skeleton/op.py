"""One sentence: what it computes of each token (source: who, paper, year)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._aggregate import upcast
from ._dispatch import implementation, implements, launch
from ._op import empty_contiguous, fused_op


def sample_op(x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """y = x * scale of each token that counts.

    Args:
        x: any shape, float. The gradient goes here.
        mask: same shape, bool or 0/1, 1 = counts. Masked tokens are not read; their output and gradient are 0.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        scale: a finite number > 0.

    Returns:
        Same shape; float32, or float64 when ``x`` is float64.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: shapes or devices differ; ``scale`` is not a finite number > 0.
    """
    _checks.floating("sample_op", x=x)
    _checks.positive("sample_op", scale=scale)
    live = _checks.live_mask("sample_op", mask, x.shape, x.device)
    return implementation("sample_op", x)(Inputs(*upcast(x), live, scale))


class Inputs(NamedTuple):
    # _save unpacks the fields in this order; trained= at the end names those that get a gradient
    x: Tensor  # any shape; float32 or float64
    live: Tensor | None  # that shape, bool
    scale: float


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("sample_op", "torch")
def _torch(inputs: Inputs) -> Tensor:
    """The formula, differentiated by autograd. It is never given what does not count, which may be NaN."""
    if inputs.live is None:
        return _value(inputs.x, inputs.scale)
    x = torch.where(inputs.live, inputs.x, 0.0)
    return torch.where(inputs.live, _value(x, inputs.scale), 0.0)


def _value(x: Tensor, scale: float) -> Tensor:
    return x * scale


# ---- on the engines: one sweep forward, one backward ----------------------------------------------------------------


def _kernel(inputs: Inputs) -> Tensor:
    x, y = inputs.x, empty_contiguous(inputs.x)
    launch(
        records.SampleOp(
            tokens=x.numel(),
            x=x.contiguous(),
            live=None if inputs.live is None else inputs.live.contiguous(),
            scale=inputs.scale,
            y=y,
        ),
        y,
    )
    return y


class _Backward(NamedTuple):
    grad_y: Tensor
    x: Tensor
    live: Tensor | None
    scale: float


def _backward_kernel(inputs: _Backward) -> Tensor:
    x, grad = inputs.x, empty_contiguous(inputs.x)
    launch(
        records.SampleOpBackward(
            tokens=x.numel(),
            x=x.contiguous(),
            live=None if inputs.live is None else inputs.live.contiguous(),
            scale=inputs.scale,
            grad_y=inputs.grad_y.contiguous(),
            grad=grad,
        ),
        grad,
    )
    return grad


def _fake(inputs: Inputs | _Backward) -> Tensor:
    return empty_contiguous(inputs.x)


def _save(ctx: Any, inputs: Inputs, output: Tensor) -> None:
    x, live, ctx.scale = inputs
    ctx.save_for_backward(x, live)


def _gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor]:
    x, live = ctx.saved_tensors
    return (_backward(_Backward(grad_y, x, live, ctx.scale)),)


_backward = fused_op("sample_op_backward", _Backward, _backward_kernel, _fake)
implements("sample_op", "fused")(
    fused_op("sample_op", Inputs, _kernel, _fake, trained=("x",), save=_save, gradient=_gradient)
)
