"""Whitening: mean 0 and variance 1 over the tokens that count."""

from typing import Any

import torch
import torch.distributed

from rlhf_fast.ops import _checks
from rlhf_fast.ops._aggregate import ordered_sum, upcast
from rlhf_fast.ops._dispatch import implementation, implements

EPSILON = 1e-8  # added to the variance


def masked_whiten(
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + 1e-8), with the mean and variance of the live elements.

    Args:
        x: any shape, float.
        mask: same shape, bool or 0/1, 1 = counts. Elsewhere the output and the gradient are 0 and nothing is read.
            A value other than 0 and 1 is an error on the CPU; on a GPU, where asking would wait, it counts as 1.
        shift_mean: True leaves the mean at 0; False adds the mean back, so that only the scale changes (rewards are
            whitened so). This is the polarity of TRL and verl; torchtune's ``whiten`` has it the other way round.
        unbiased: the variance divides by n - 1 (by n when False). With one live element it is 0, not NaN.
        group: a torch.distributed process group, every rank of which calls this: the statistics are those of all
            ranks together. None means this process alone; for all ranks give ``torch.distributed.group.WORLD``.

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
    flat = implementation("masked_whiten", x)(
        upcast(x)[0].reshape(-1), None if live is None else live.reshape(-1), shift_mean, unbiased, group
    )
    return flat.view(x.shape)


@implements("masked_whiten", "torch")
def _torch(
    x: torch.Tensor,
    live: torch.Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    group: "torch.distributed.ProcessGroup | None",
) -> torch.Tensor:
    """(N,), (N,) -> (N,)."""
    if live is None:
        live = torch.ones_like(x, dtype=torch.bool)
    # two passes, deviations after the mean: the difference of E[x^2] and E[x]^2 cancels when the mean is large
    count, total = _over_ranks(torch.stack((live.sum().to(x.dtype), ordered_sum(torch.where(live, x, 0.0)))), group)
    mean = _Spread.apply(total / count.clamp(min=1), x.shape[0])
    deviation = torch.where(live, x - mean, 0.0)
    (squares,) = _over_ranks(ordered_sum(deviation * deviation).reshape(1), group)
    variance = squares / (count - 1 if unbiased else count).clamp(min=1)
    whitened = deviation * _Spread.apply(torch.rsqrt(variance + EPSILON), x.shape[0])
    return whitened if shift_mean else torch.where(live, whitened + mean, 0.0)


class _Spread(torch.autograd.Function):
    """() -> (N,). Broadcasting does the same, but the sum in its backward depends on the number of threads."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scalar: torch.Tensor, size: int) -> torch.Tensor:
        return scalar.repeat(size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ordered_sum(grads[0]), None


def _over_ranks(sums: torch.Tensor, group: "torch.distributed.ProcessGroup | None") -> tuple[torch.Tensor, ...]:
    """The sums of all ranks of ``group`` together; added in float64, so that a large token count stays exact."""
    if group is not None:
        total = sums.double()
        torch.distributed.all_reduce(total, group=group)
        sums = total.to(sums.dtype)
    return sums.unbind()
