"""The Bradley-Terry loss of a reward model."""

import torch

from rlhf_fast.ops import _checks
from rlhf_fast.ops._aggregate import masked_mean, upcast
from rlhf_fast.ops._dispatch import implementation, implements


def pairwise_loss(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of -log sigmoid(chosen - rejected - margin) over N pairs.

    Source: Stiennon et al. 2020, arXiv 2009.01325; the margin is Llama 2's, arXiv 2307.09288, section 3.2.2.

    Args:
        chosen: (N,) scores of the preferred responses, float.
        rejected: (N,) scores of the rejected responses.
        margin: (N,) subtracted from each pair's difference, in units of score; a constant, without gradient.

    Returns:
        0-dim, float32 (float64 when an input is); 0 with zero gradient when N is 0.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ, or are not (N,).
    """
    op = "pairwise_loss"
    _checks.floating(op, chosen=chosen, rejected=rejected)
    if margin is not None:
        _checks.floating(op, margin=margin)
    if chosen.dim() != 1:
        raise ValueError(f"{op}: chosen must have shape (N,), one score a pair; got {tuple(chosen.shape)}")
    _checks.shaped(op, chosen.shape, "that of chosen", rejected=rejected, margin=margin)
    _checks.same_device(op, chosen=chosen, rejected=rejected, margin=margin)

    target = torch.zeros_like(chosen) if margin is None else _checks.constant(margin)
    return implementation(op, chosen)(*upcast(chosen, rejected, target))


@implements("pairwise_loss", "torch")
def _torch(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """All tensors (N,), one dtype."""
    return masked_mean(-torch.nn.functional.logsigmoid(chosen - rejected - margin), None)
