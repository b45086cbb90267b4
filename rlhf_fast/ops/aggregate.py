"""The aggregation of a loss per token to one number."""

import torch
from torch import Tensor

from . import _checks
from ._aggregate import check_aggregation, reduced, upcast


def aggregate(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """One number from one value per token, as the losses here aggregate theirs. Differentiable.

    | aggregation             | the result                                                                          |
    |-------------------------|-------------------------------------------------------------------------------------|
    | token-mean              | sum / live tokens (DAPO, arXiv 2503.14476)                                          |
    | seq-mean-token-sum      | sum / sequences                                                                     |
    | seq-mean-token-mean     | sum over sequences of their token mean / sequences (GRPO, arXiv 2402.03300)         |
    | seq-mean-token-sum-norm | sum / (sequences * T), T = values.shape[1]: a constant normaliser, so that length   |
    |                         | does not weigh a sequence up or down (Dr. GRPO, arXiv 2503.20783)                   |

    A sequence without a live token does not count as a sequence.

    Args:
        values: (B, T), or any shape for token-mean; float.
        mask: same shape, bool or 0/1, 1 = counts. Masked values are not read and get gradient 0.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        weights: same shape, float; factors of the values, such as importance weights or those of labels; a constant.
            They do not change the divisor: for a weighted mean, give their sum over live tokens as num_items. Masked
            weights are not read.
        aggregation: a name of the table.
        num_items: replaces the number of live tokens (token-mean) or of sequences (the others) in the divisor. Give the
            number of the whole batch, and the sum over micro-batches or ranks is the result of the whole batch. A
            number or a 0-dim tensor; 1 gives sums. 0 is read as 1: there the whole batch is masked, the result 0.

    Returns:
        0-dim, float32 (float64 when an input is); 0 with zero gradient when nothing is live.

    Raises:
        TypeError: ``values`` or ``weights`` are no floating-point tensor; ``num_items`` is neither a number nor a
            tensor.
        ValueError: a shape or device differs; an unknown aggregation, or one that needs (B, T) without it; a negative
            or infinite ``num_items``.
    """
    op = "aggregate"
    given = {"values": values} if weights is None else {"values": values, "weights": weights}
    _checks.alike(op, "that of values", **given)
    check_aggregation(op, values, aggregation, num_items)
    live = _checks.live_mask(op, mask, values.shape, values.device)
    if weights is None:
        (values,) = upcast(values)
    else:
        values, weights = upcast(values, _checks.constant(weights))
        values = values * (weights if live is None else torch.where(live, weights, 0.0))
    return reduced(values, live, aggregation=aggregation, num_items=num_items)
