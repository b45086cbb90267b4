"""Shared by the policy losses that are composed of torch's functions: checked tokens, and a result with statistics."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._aggregate import check_aggregation, masked_mean, reduced, upcast
from .clipped_policy_loss import PolicyLoss, clipped_policy_loss


class Tokens(NamedTuple):
    """Checked inputs of one dtype; masked entries of the three are 0, and their gradient too."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    live: Tensor | None


def checked_tokens(
    op: str,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    aggregation: str,
    num_items: float | Tensor | None,
) -> Tokens:
    if old_logprobs is None:
        old_logprobs = logprobs
    _checks.alike(op, "that of logprobs", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_aggregation(op, logprobs, aggregation, num_items)
    live = _checks.live_mask(op, mask, logprobs.shape, logprobs.device)
    given = upcast(logprobs, _checks.constant(old_logprobs), _checks.constant(advantages))
    logprobs, old_logprobs, advantages = (live_or_zero(live, tensor) for tensor in given)
    return Tokens(logprobs, old_logprobs, advantages, live)


def check_sequences(op: str, logprobs: Tensor) -> None:
    if isinstance(logprobs, Tensor) and logprobs.dim() != 2:
        raise ValueError(f"{op}: logprobs must have shape (B, T), one row a sequence; got {tuple(logprobs.shape)}")


def checked_weights(op: str, weights: Tensor | None, given: Tokens) -> Tensor | None:
    """Factors of the tokens' losses, a constant of their dtype, 0 where masked; None stays None."""
    if weights is None:
        return None
    _checks.alike(op, "that of logprobs", logprobs=given.logprobs, weights=weights)
    return live_or_zero(given.live, _checks.constant(weights).to(given.logprobs.dtype))


def live_or_zero(live: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if live is None else torch.where(live, tensor, 0.0)


def lengths(tokens: Tokens) -> Tensor | int:
    """(B,) the number of live tokens of each sequence, at least 1."""
    return max(tokens.logprobs.shape[1], 1) if tokens.live is None else tokens.live.sum(-1).clamp(min=1)


def with_statistics(
    given: Tokens, losses: Tensor, clipped: Tensor, aggregation: str, num_items: float | Tensor | None
) -> PolicyLoss:
    """The aggregated loss with the statistics of the tokens' ratios."""
    measured = clipped_policy_loss(given.logprobs.detach(), given.old_logprobs, given.advantages, given.live)
    return measured._replace(
        loss=reduced(losses, given.live, aggregation=aggregation, num_items=num_items),
        clip_fraction=masked_mean(clipped.to(losses.dtype), given.live),
    )
