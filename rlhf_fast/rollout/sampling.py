"""Drawing one token a row from the full softmax, with one pass over the logits and no copy of them."""

import torch
from torch import Tensor

BLOCK = 256  # tokens whose probabilities are first summed: the draw then looks into one block alone


def sample(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs under softmax(logits / temperature), by inverse CDF.

    Args:
        logits: (B, V) float32; overwritten.
        temperature: above 0.
        uniforms: (B,) float64 in [0, 1), one draw a row: the row's token depends on nothing else beside its logits.

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
    tokens = (block * BLOCK + place)[:, 0].clamp(max=weights.shape[1] - 1)  # of a row that is not finite
    logprobs = inside.gather(1, place).double().log() - total.log()
    return tokens, logprobs[:, 0].float()


def _find(ends: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The first part, of those that end at ``ends`` (B, n), which ``wanted`` (B, 1) lies in, and where it lies there;
    never a part of no width."""
    wanted = torch.minimum(wanted, torch.nextafter(ends[:, -1:], torch.zeros_like(wanted)))
    part = torch.searchsorted(ends, wanted, right=True).clamp(max=ends.shape[1] - 1)
    before = torch.where(part > 0, ends.gather(1, (part - 1).clamp(min=0)), 0.0)
    return part, wanted - before
