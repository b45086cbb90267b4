"""Whitening: mean 0 and variance 1 over the tokens that count."""

from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._aggregate import ordered_sum, upcast
from ._dispatch import implementation, implements, launch
from ._op import empty_contiguous, fused_op
from ._rows import flat, unflat

EPSILON = 1e-8  # added to the variance


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), with the mean and variance of the live elements.

    Args:
        x: any shape, float.
        mask: same shape, bool or 0/1, 1 = counts. Masked elements are not read; their output and gradient are 0.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        shift_mean: True: the result has mean 0. False: the mean is added back, so that only the scale changes (usual
            for rewards). TRL and verl use the same polarity, torchtune's ``whiten`` the opposite.
        unbiased: the variance divides by n - 1 (by n when False). With one live element it is 0, not NaN.
        group: a torch.distributed process group over which mean and variance are computed; every rank must call. None:
            only this process; for all ranks pass ``torch.distributed.group.WORLD``.

    Returns:
        Shape of ``x``, float32 (float64 for float64). Differentiable without a group.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: the mask's shape or device differs; a gradient is asked for together with ``group``.
    """
    _checks.floating("masked_whiten", x=x)
    live = _checks.live_mask("masked_whiten", mask, x.shape, x.device)
    if group is not None and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "masked_whiten: expected an x without gradient when group is given, since none flows between ranks; "
            "got x.requires_grad=True. Pass x.detach()."
        )
    whitened = implementation("masked_whiten", x)(
        flat(upcast(x)[0]), None if live is None else flat(live), shift_mean, unbiased, group
    )
    return unflat(whitened, x.shape)


@implements("masked_whiten", "torch")
def _torch(
    x: Tensor,
    live: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    group: "torch.distributed.ProcessGroup | None",
) -> Tensor:
    """(N,), (N,) -> (N,)."""
    if live is None:
        live = torch.ones_like(x, dtype=torch.bool)
    # two passes, mean first: E[x^2] - E[x]^2 would cancel for a large mean
    count, total = _over_ranks(torch.stack((live.sum().to(x.dtype), ordered_sum(torch.where(live, x, 0.0)))), group)
    mean = _Spread.apply(total / count.clamp(min=1), x.shape[0])
    deviation = torch.where(live, x - mean, 0.0)
    (squares,) = _over_ranks(ordered_sum(deviation * deviation).reshape(1), group)
    variance = squares / (count - 1 if unbiased else count).clamp(min=1)
    whitened = deviation * _Spread.apply(torch.rsqrt(variance + EPSILON), x.shape[0])
    return whitened if shift_mean else torch.where(live, whitened + mean, 0.0)


class _Spread(torch.autograd.Function):
    """() -> (N,), like broadcasting, but with a backward whose sum does not depend on the number of threads."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scalar: Tensor, size: int) -> Tensor:
        return scalar.repeat(size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ordered_sum(grads[0]), None


def _over_ranks(sums: Tensor, group: "torch.distributed.ProcessGroup | None") -> tuple[Tensor, ...]:
    """All-reduces the sums over ``group``, in float64, so that a large token count stays exact."""
    if group is not None:
        total = sums.double()
        torch.distributed.all_reduce(total, group=group)
        sums = total.to(sums.dtype)
    return sums.unbind()


# ---- on the engines: two passes for mean and variance, in float64, and one for the result ---------------------------


@implements("masked_whiten", "fused")
def _fused(
    x: Tensor,
    live: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    group: "torch.distributed.ProcessGroup | None",
) -> Tensor:
    statistics = None if group is None else _statistics_over_ranks(x, live, unbiased, group)
    return _forward(Inputs(x, live, shift_mean, unbiased, statistics))[0]


def _statistics_over_ranks(
    x: Tensor, live: Tensor | None, unbiased: bool, group: "torch.distributed.ProcessGroup"
) -> Tensor:
    moments = _moments(Moments(x, live, None))
    torch.distributed.all_reduce(moments, group=group)
    count, total = moments.unbind()
    mean = total / count.clamp(min=1)
    deviations = _moments(Moments(x, live, mean))
    torch.distributed.all_reduce(deviations, group=group)
    variance = deviations[1] / (count - 1 if unbiased else count).clamp(min=1)
    return torch.stack((count, mean, torch.rsqrt(variance + EPSILON)))


class Moments(NamedTuple):
    x: Tensor  # (N,)
    live: Tensor | None
    mean: Tensor | None  # () float64


def _moments_kernel(inputs: Moments) -> Tensor:
    """-> (2,) float64: the number of live elements, and their sum or, given a mean, their sum of squared deviations."""
    x, moments = inputs.x, _empty_moments(inputs)
    launch(
        records.MaskedMoments(
            elements=x.shape[0],
            x=x.contiguous(),
            live=None if inputs.live is None else inputs.live.contiguous(),
            mean=inputs.mean,
            moments=moments,
        ),
        x,
    )
    return moments


def _empty_moments(inputs: Moments) -> Tensor:
    return inputs.x.new_empty(2, dtype=torch.float64)


class Inputs(NamedTuple):
    x: Tensor  # (N,)
    live: Tensor | None
    shift_mean: bool
    unbiased: bool
    statistics: Tensor | None  # (3,) float64: live elements, mean, scale; None = computed from x


def _kernel(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> whitened (N,), and the statistics that it used."""
    x, live = inputs.x, inputs.live
    whitened, used = _outputs(inputs)
    if inputs.statistics is not None:
        used.copy_(inputs.statistics)
    launch(
        records.MaskedWhiten(
            elements=x.shape[0],
            x=x.contiguous(),
            live=None if live is None else live.contiguous(),
            shift_mean=inputs.shift_mean,
            unbiased=inputs.unbiased,
            given=inputs.statistics is not None,
            statistics=used,
            whitened=whitened,
        ),
        x,
    )
    return whitened, used


def _outputs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return empty_contiguous(inputs.x), inputs.x.new_empty(3, dtype=torch.float64)


class _Backward(NamedTuple):
    grad_whitened: Tensor
    x: Tensor
    live: Tensor | None
    shift_mean: bool
    unbiased: bool
    statistics: Tensor


def _backward_kernel(inputs: _Backward) -> Tensor:
    x, live = inputs.x, inputs.live
    grad = empty_contiguous(x)
    launch(
        records.MaskedWhitenBackward(
            elements=x.shape[0],
            x=x.contiguous(),
            live=None if live is None else live.contiguous(),
            shift_mean=inputs.shift_mean,
            unbiased=inputs.unbiased,
            statistics=inputs.statistics,
            grad_whitened=inputs.grad_whitened.contiguous(),
            grad=grad,
        ),
        x,
    )
    return grad


def _save(ctx: Any, inputs: Inputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.shift_mean, ctx.unbiased = inputs.shift_mean, inputs.unbiased
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs.x, inputs.live, output[1])


def _gradient(ctx: Any, grad_whitened: Tensor, _: Tensor) -> tuple[Tensor]:
    x, live, statistics = ctx.saved_tensors
    return (_backward(_Backward(grad_whitened, x, live, ctx.shift_mean, ctx.unbiased, statistics)),)


_moments = fused_op("masked_moments", Moments, _moments_kernel, _empty_moments)
_backward = fused_op("masked_whiten_backward", _Backward, _backward_kernel, lambda inputs: empty_contiguous(inputs.x))
_forward = fused_op("masked_whiten", Inputs, _kernel, _outputs, trained=("x",), save=_save, gradient=_gradient)
