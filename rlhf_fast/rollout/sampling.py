"""Samples one token per row from the full softmax, in place."""

import torch
from torch import Tensor

BLOCK = 256  # columns per partial sum: the search finds the block first, and then the column inside it


def sample(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs under softmax(logits / temperature), by inverse CDF.

    Args:
        logits: (B, V) float32; overwritten.
        temperature: above 0.
        uniforms: (B,) float64 in [0, 1). A row's token depends only on its number and its logits.

    Returns:
        tokens (B,) int64 and log-probs (B,) float32 in nats; NaN where a row's logits hold NaN or +inf.
    """
    top = logits.max(dim=1, keepdim=True).values
    weights = logits.sub_(top).div_(temperature).exp_()
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = torch.cat([weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(2), weights[:, whole:].sum(1, True)], dim=1)
    ends = sums.double().cumsum(dim=1)
    total = ends[:, -1:]
    block, rest = _find(ends, uniforms[:, None] * total)
    places = block * BLOCK + torch.arange(BLOCK, device=logits.device)
    inside = weights.gather(1, places.clamp(max=weights.shape[1] - 1))
    inside = inside.masked_fill(places >= weights.shape[1], 0.0)
    place, _ = _find(inside.double().cumsum(dim=1), rest)
    tokens = (block * BLOCK + place)[:, 0].clamp(max=weights.shape[1] - 1)  # the clamp acts only for NaN or +inf
    logprobs = inside.gather(1, place).double().log() - total.log()
    return tokens, logprobs[:, 0].float()


def _find(ends: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The index of the part in which ``wanted`` (B, 1) lies, and the offset in it. Part i ends at ``ends[:, i]``.
    Never returns an empty part."""
    wanted = torch.minimum(wanted, torch.nextafter(ends[:, -1:], torch.zeros_like(wanted)))
    part = torch.searchsorted(ends, wanted, right=True).clamp(max=ends.shape[1] - 1)
    before = torch.where(part > 0, ends.gather(1, (part - 1).clamp(min=0)), 0.0)
    return part, wanted - before
