"""Dynamic fine-tuning: cross-entropy whose tokens weigh as much as the model believes them."""

import torch
from torch import Tensor

from . import _checks
from ._aggregate import check_aggregation, reduced, upcast


def dft_loss(
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """-sg[p] log p per label, aggregated, with p its probability (DFT, arXiv 2508.05629).

    Args:
        logprobs: (B, T), or any shape with token-mean; float; of the labels, such as from ``linear_logprobs``.
            Differentiable.
        mask, aggregation, num_items: as in ``aggregate``.

    Returns:
        0-dim, float32 (float64 for float64); 0 with zero gradient when nothing is live. A log-prob of -inf adds 0.

    Raises:
        TypeError: ``logprobs`` is not a floating-point tensor.
        ValueError: the mask's shape or device differs; an argument outside the ranges of ``aggregate``.
    """
    op = "dft_loss"
    _checks.floating(op, logprobs=logprobs)
    check_aggregation(op, logprobs, aggregation, num_items)
    live = _checks.live_mask(op, mask, logprobs.shape, logprobs.device)
    (wide,) = upcast(logprobs)
    impossible = wide == -torch.inf
    counted = ~impossible if live is None else live & ~impossible
    wide = torch.where(counted, wide, 0.0)  # of which 0 is left
    return reduced(-wide.detach().exp() * wide, live, aggregation=aggregation, num_items=num_items)
