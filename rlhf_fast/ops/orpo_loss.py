"""The odds-ratio loss of ORPO: preferences without a reference."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import _checks
from ._aggregate import masked_mean, upcast


def orpo_loss(chosen: Tensor, rejected: Tensor, *, reduction: str = "mean") -> Tensor:
    """The mean over N pairs of -log sigmoid(log odds(chosen) - log odds(rejected)), with odds = p / (1 - p) of p =
    exp(mean log-prob of a token) (ORPO, arXiv 2403.07691, eq. 7).

    ORPO's loss is the cross-entropy of the chosen responses (``linear_cross_entropy``) + lambda * this.

    Args:
        chosen, rejected: (N,) mean log-probs per response token, < 0, float. Differentiable.
        reduction: "mean", or "none" for the loss of each pair.

    Returns:
        0-dim, or (N,) with "none"; float32 (float64 when an input is); 0 with zero gradient when N is 0. At a log-prob
        of 0 the odds are infinite.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ, or are not (N,); an unknown reduction.
    """
    op = "orpo_loss"
    _checks.alike(op, "that of chosen", chosen=chosen, rejected=rejected)
    if chosen.dim() != 1:
        raise ValueError(f"{op}: chosen must have shape (N,), one a pair; got {tuple(chosen.shape)}")
    _checks.one_of(op, "reduction", reduction, ("mean", "none"))
    chosen, rejected = upcast(chosen, rejected)
    losses = -logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return losses if reduction == "none" else masked_mean(losses, None)


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)). 1 - p is computed as 1 - exp(x) for small p and as -(exp(x) - 1) for p near 1, so that no
    digits are lost; each branch is fed a number at which its gradient is finite."""
    near_one = logprob > -math.log(2)
    rest = torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, logprob, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_one, -1.0, logprob))),
    )
    return logprob - rest
