"""Whitening by the row or by groups of rows."""

import torch
from torch import Tensor

from . import _checks
from ._aggregate import ordered_sum, upcast
from .group_advantages import group_of_each, sums_of_groups
from .masked_whiten import EPSILON


def group_whiten(
    x: Tensor,
    groups: Tensor | int,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
) -> Tensor:
    """``masked_whiten`` of each group of rows by itself: (x - mean) / sqrt(variance + 1e-8) with the mean and variance
    of the group's live elements.

    Args:
        x: (B, T), float.
        groups: (B,) integers, equal for the rows of one group, in any order; or the size of every group, where its rows
            stand together: 1 whitens each row by itself.
        mask, shift_mean, unbiased: as in ``masked_whiten``. A group with one live element has variance 0.

    Returns:
        (B, T), float32 (float64 for float64), without gradient. A live NaN makes its group NaN.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``groups`` are not integers.
        ValueError: a shape or device differs, or B is no multiple of the size.
    """
    op = "group_whiten"
    _checks.floating(op, x=x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x must have shape (B, T); got {tuple(x.shape)}")
    live = _checks.live_mask(op, mask, x.shape, x.device)
    group = group_of_each(op, groups, "x", x)
    (wide,) = upcast(x.detach())
    if live is None:
        live = torch.ones_like(wide, dtype=torch.bool)

    def summed(values: Tensor) -> Tensor:
        """(B, T) -> (B, 1): at each row the sum over the live elements of its group."""
        return sums_of_groups(ordered_sum(torch.where(live, values, 0.0)), group).unsqueeze(-1)

    values = wide.double()
    count = summed(torch.ones_like(values))
    mean = summed(values) / count.clamp(min=1)
    deviations = values - mean
    variance = summed(deviations.square()) / (count - 1 if unbiased else count).clamp(min=1)
    whitened = deviations * torch.rsqrt(variance + EPSILON) + (0.0 if shift_mean else mean)
    return torch.where(live, whitened, 0.0).to(wide.dtype)
