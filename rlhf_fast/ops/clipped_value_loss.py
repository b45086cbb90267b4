"""PPO's clipped value loss."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._aggregate import check_aggregation, masked_mean, reduced, scalar_tensor, upcast
from ._dispatch import implementation, implements
from ._losses import LossInputs, value_terms


class ValueLoss(NamedTuple):
    """0-dim tensors on the device of the inputs; ``clip_fraction`` has no gradient."""

    loss: Tensor
    clip_fraction: Tensor  # share of live tokens whose loss is clipped


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> ValueLoss:
    """0.5 * max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) per token, aggregated.

    Source: the value loss of OpenAI baselines' PPO2 and of lm-human-preferences. Multiply by your own coefficient.

    Args:
        values: (B, T), or any shape with token-mean; float. The only input with a gradient.
        old_values: same shape; the critic's values when the tokens were sampled.
        returns: same shape; the targets, such as the returns of ``gae``.
        mask: same shape, bool or 0/1, 1 = counts. Masked tokens are not read and get gradient 0.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        clip: how far a value may move from its old value, in units of reward; None does not clip.
        aggregation, num_items: see ``aggregate``.

    Returns:
        ``ValueLoss``, float32 (float64 when an input is), both 0 when nothing is live.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; clip is not a finite number above 0; aggregation does not fit.
    """
    op = "clipped_value_loss"
    _checks.alike(op, "that of values", values=values, old_values=old_values, returns=returns)
    terms = value_terms(op, clip=clip)
    check_aggregation(op, values, aggregation, num_items)
    live = _checks.live_mask(op, mask, values.shape, values.device)

    values, old_values, returns = upcast(values, _checks.constant(old_values), _checks.constant(returns))
    loss, (clip_fraction,) = implementation(op, values)(
        LossInputs(
            values=values,
            old_values=old_values,
            returns=returns,
            live=live,
            value_terms=terms,
            aggregation=aggregation,
            num_items=scalar_tensor(num_items),
        )
    )
    return ValueLoss(loss, clip_fraction)


@implements("clipped_value_loss", "torch")
def reference(inputs: LossInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-> the loss, and clip_fraction."""
    values, old_values, returns = inputs.values, inputs.old_values, inputs.returns
    clip, live = inputs.value_terms.clip, inputs.live
    if live is None:
        live = torch.ones_like(values, dtype=torch.bool)
    # Masked old_values and returns may be NaN: this where stops their gradient, and aggregate ignores their loss.
    values = torch.where(live, values, 0.0)
    errors = (values - returns).square()
    clipped = torch.zeros_like(live)
    if clip < math.inf:
        # The clipped branch is selected only beyond a bound, where it is constant. Detaching the values there also
        # avoids 0 * inf for an infinite return.
        clipped_errors = (values.detach().clamp(old_values - clip, old_values + clip) - returns).square()
        clipped = clipped_errors > errors
        # where instead of maximum, which would split the gradient at a tie
        errors = torch.where(clipped, clipped_errors, errors)
    loss = reduced(0.5 * errors, live, aggregation=inputs.aggregation, num_items=inputs.num_items)
    return loss, (masked_mean(clipped.to(values.dtype), live),)
