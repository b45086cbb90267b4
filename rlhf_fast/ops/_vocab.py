"""The row formulas of the vocabulary-level ops: one row is one token, one column one vocabulary entry.

With the target's logit x_t set apart, d = logsumexp_{j != t} x_j - x_t is the log odds against the target, and

    log p_t   = -softplus(d)                    1 - p_t = sigmoid(d)
    d log p_t / d x_t = sigmoid(d)              d log p_t / d x_j = -p_j = -sigmoid(d) q_j
    entropy   = H(sigmoid(d)) + sigmoid(d) H(q)

where q is the softmax over the other columns alone. No step subtracts near-equal numbers, so a confident token
(p_t -> 1) keeps its relative precision; ``x_t - logsumexp`` and ``p_t - 1`` would lose it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks

# Elements of the full-precision temporaries of one chunk of rows: 16 MiB in fp32.
CHUNK_ELEMENTS = 1 << 22
# Stands for an infinite log-ratio where it meets a probability that has underflowed to 0, so that 0 * inf is 0.
_FAR = 1e4


class RowStatistics(NamedTuple):
    """What the gradient needs of a row. All (n,), in the accumulation dtype."""

    log_odds: Tensor  # d above: logsumexp of the other columns minus the target's logit
    shift: Tensor  # the largest other logit (0 where there is none above -inf)
    total: Tensor  # sum of exp(other - shift) (1 where there is none)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover ``rows`` rows of ``columns`` columns, about CHUNK_ELEMENTS elements each."""
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for chunk in range(-(-rows // step)):  # a compiled graph then depends on their number alone, not on ``rows``
        yield slice(chunk * step, min((chunk + 1) * step, rows))


def all_dead(live: Tensor) -> bool:
    """Whether a chunk can be skipped, where that can be asked."""
    return _checks.at_hand(live) and not bool(live.any())


def row_sum(values: Tensor) -> Tensor:
    """(n, V) -> (n,), in an order that depends on V alone.

    torch splits the sum of a lone row over threads; with a twin beside it, it is summed as in any batch.
    """
    if values.shape[0] == 1:
        return torch.cat([values, values]).sum(dim=1)[:1]
    return values.sum(dim=1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to full relative precision (torch's own switches to x above 20, too early for float64)."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x). torch's own rounds differently in its vector and scalar loops, so by place in the batch."""
    return torch.reciprocal(1 + torch.exp(-x))


def cap_and_scale(logits: Tensor, softcap: float | None, temperature: Tensor) -> Tensor:
    """softcap * tanh(logits / softcap), less the row's largest, then divided by the row's temperature.

    A softmax does not see what is taken off a whole row; the division would round logits far from 0 before they meet.
    """
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    peak = logits.amax(dim=1, keepdim=True)
    return (logits - peak.masked_fill(peak.isinf(), 0.0)) / temperature[:, None]


def cap_and_scale_backward(grad: Tensor, logits: Tensor, softcap: float | None, temperature: Tensor) -> Tensor:
    """The gradient of ``cap_and_scale`` with respect to the raw logits."""
    if softcap is not None:
        grad = grad * (1 - torch.tanh(logits / softcap).square())
    return grad / temperature[:, None]


def row_statistics(logits: Tensor, targets: Tensor) -> RowStatistics:
    """Statistics of scaled logits (n, V) and targets (n,). A target out of range or at +inf gives NaN log odds."""
    column, in_range = _column(targets, logits.shape[1])
    target_logit = logits.gather(1, column).squeeze(1)
    others = logits.scatter(1, column, -torch.inf)
    peak = others.amax(dim=1)
    alone = peak == -torch.inf
    shift = peak.masked_fill(alone, 0.0)
    total = row_sum(torch.exp(others - shift[:, None])).masked_fill(alone, 1.0)
    log_odds = (peak - target_logit) + torch.log(total)
    return RowStatistics(log_odds.masked_fill(~in_range | (target_logit == torch.inf), torch.nan), shift, total)


def row_entropy(logits: Tensor, targets: Tensor, statistics: RowStatistics) -> Tensor:
    """Entropy in nats, (n,). A column at -inf adds nothing."""
    log_odds, shift, total = statistics
    column, _ = _column(targets, logits.shape[1])
    gap = shift[:, None] - logits.scatter(1, column, -torch.inf)
    spread = torch.log(total) + row_sum(torch.exp(-gap) * gap.clamp(max=_FAR)) / total
    certainty = log_odds.abs().clamp(max=_FAR)
    split = sigmoid(-certainty) * certainty + torch.log1p(torch.exp(-certainty))
    return split + sigmoid(log_odds) * spread


def row_gradient(
    logits: Tensor,
    targets: Tensor,
    statistics: RowStatistics,
    grad_logprobs: Tensor | None,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient with respect to the scaled logits, (n, V).

    ``entropy`` is needed where ``grad_entropy`` is given: d entropy / d x_j = -p_j (log p_j + entropy).
    """
    log_odds, shift, total = statistics
    column, _ = _column(targets, logits.shape[1])
    gap = shift[:, None] - logits.scatter(1, column, -torch.inf)
    others_mass = sigmoid(log_odds)
    pull = torch.zeros_like(log_odds) if grad_logprobs is None else grad_logprobs
    slope = -pull[:, None]
    at_target = pull * others_mass
    if grad_entropy is not None and entropy is not None:
        log_p = -(gap + (torch.log(total) + softplus(-log_odds))[:, None]).clamp(max=_FAR)
        slope = slope - grad_entropy[:, None] * (log_p + entropy[:, None])
        at_target = at_target - grad_entropy * sigmoid(-log_odds) * (entropy - softplus(log_odds).clamp(max=_FAR))
    grad = torch.exp(-gap) * (others_mass / total)[:, None] * slope
    return grad.scatter_(1, column, at_target[:, None])


def _column(targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(n, 1) indices that are safe to gather with, and whether the target was in range."""
    in_range = (targets >= 0) & (targets < columns)
    return targets.masked_fill(~in_range, 0)[:, None], in_range
