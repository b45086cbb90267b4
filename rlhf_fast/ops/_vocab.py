"""The row formulas of the torch reference: a row is one token, a column one vocabulary entry.

d = logsumexp_{j != t} x_j - x_t is the log odds against the target t. With it,

    log p_t   = -softplus(d)                    1 - p_t = sigmoid(d)
    d log p_t / d x_t = sigmoid(d)              d log p_t / d x_j = -p_j = -sigmoid(d) q_j
    entropy   = H(sigmoid(d)) + sigmoid(d) H(q)

where q is the softmax over the columns other than t. No step subtracts nearly equal numbers, so a confident token
(p_t -> 1) keeps its relative precision; ``x_t - logsumexp`` and ``p_t - 1`` would lose it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks

# Elements of a chunk of rows, whose temporaries are in full precision: 16 MiB in fp32.
CHUNK_ELEMENTS = 1 << 22
# Bound of a log-ratio that is multiplied by a probability. Where the probability is 0, the product is 0, not 0 * inf.
_FAR = 1e4


class RowStatistics(NamedTuple):
    """The statistics of a row that its gradient needs. All (n,), in the accumulation dtype."""

    log_odds: Tensor  # d above: logsumexp of the other columns minus the target's logit
    shift: Tensor  # the largest logit of the other columns (0 if all are -inf)
    total: Tensor  # sum of exp(logit - shift) over the other columns (1 if all are -inf)


class RowExtras(NamedTuple):
    """Statistics of a row that have no gradient, all (n,), in the order of the columns of RowOutputs.extras."""

    mean_logit: Tensor
    log_sum_squares: Tensor
    is_top1: Tensor  # 0 or 1


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover ``rows`` rows of ``columns`` columns, about CHUNK_ELEMENTS elements each."""
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for chunk in range(-(-rows // step)):  # so that a compiled graph depends on the number of chunks, not on ``rows``
        yield slice(chunk * step, min((chunk + 1) * step, rows))


def all_dead(live: Tensor) -> bool:
    """Whether a chunk has no live row; False where the values cannot be read."""
    return _checks.at_hand(live) and not bool(live.any())


def row_sum(values: Tensor) -> Tensor:
    """(n, V) -> (n,), summed in an order that depends only on V.

    torch splits the sum of a single row over threads, so a single row is summed together with a copy of itself.
    """
    if values.shape[0] == 1:
        return torch.cat([values, values]).sum(dim=1)[:1]
    return values.sum(dim=1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to full relative precision (torch's own switches to x above 20, too early for float64)."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x). torch.sigmoid rounds differently in its vector and scalar loops, so by position in the batch."""
    return torch.reciprocal(1 + torch.exp(-x))


def cap_and_scale(logits: Tensor, softcap: float | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """softcap * tanh(logits / softcap), minus the row's maximum, divided by the row's temperature.

    Subtracting the maximum does not change the softmax. Without it, the division would round large logits. Also returns
    what was subtracted, divided by the temperature, (n,).
    """
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    peak = logits.amax(dim=1, keepdim=True)
    peak = peak.masked_fill(peak.isinf(), 0.0)
    return (logits - peak) / temperature[:, None], peak.squeeze(1) / temperature


def cap_and_scale_backward(grad: Tensor, logits: Tensor, softcap: float | None, temperature: Tensor) -> Tensor:
    """The gradient of ``cap_and_scale`` with respect to the raw logits."""
    if softcap is not None:
        grad = grad * (1 - torch.tanh(logits / softcap).square())
    return grad / temperature[:, None]


def row_statistics(logits: Tensor, targets: Tensor) -> RowStatistics:
    """Statistics of scaled logits (n, V) and targets (n,); NaN log odds for a target out of range or at +inf."""
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


def row_summary(logits: Tensor, targets: Tensor, statistics: RowStatistics, offset: Tensor) -> tuple[Tensor, RowExtras]:
    """logsumexp (n,) and extras of scaled logits (n, V), from whose rows cap_and_scale subtracted ``offset`` (n,).

    Their maximum is 0. A NaN row has NaN, and is not top-1.
    """
    column, _ = _column(targets, logits.shape[1])
    invalid = statistics.log_odds.isnan()
    log_norm = torch.log(row_sum(torch.exp(logits))).masked_fill(invalid, torch.nan)
    log_sum_squares = torch.log(row_sum(torch.exp(2 * logits))) - 2 * log_norm
    mean = (row_sum(logits + offset[:, None]) / logits.shape[1]).masked_fill(invalid, torch.nan)
    top = (logits.gather(1, column).squeeze(1) >= logits.amax(dim=1)) & ~invalid
    return offset + log_norm, RowExtras(mean, log_sum_squares, top.to(logits.dtype))


def row_gradient(
    logits: Tensor,
    targets: Tensor,
    statistics: RowStatistics,
    grad_logprobs: Tensor | None,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
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
    if grad_logsumexp is not None:
        slope = slope + grad_logsumexp[:, None]
        at_target = at_target + grad_logsumexp * sigmoid(-log_odds)
    grad = torch.exp(-gap) * (others_mass / total)[:, None] * slope
    return grad.scatter_(1, column, at_target[:, None])


def _column(targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Indices (n, 1) that are safe for gather (0 for a target out of range), and whether the target is in range."""
    in_range = (targets >= 0) & (targets < columns)
    return targets.masked_fill(~in_range, 0)[:, None], in_range
