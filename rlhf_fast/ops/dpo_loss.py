"""Direct preference optimisation (DPO) and its kin: losses of the sequence log-probs of pairs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.ops import _checks
from rlhf_fast.ops._aggregate import masked_mean, upcast
from rlhf_fast.ops._dispatch import implementation, implements


class DPOLoss(NamedTuple):
    """On the device of the inputs. All but ``loss`` are statistics, without gradient."""

    loss: Tensor  # 0-dim, or (N,) with reduction "none"
    chosen_rewards: Tensor  # (N,) beta * (policy_chosen - ref_chosen)
    rejected_rewards: Tensor  # (N,) beta * (policy_rejected - ref_rejected)
    accuracy: Tensor  # 0-dim, the share of pairs with chosen reward > rejected reward


class _Pairs(NamedTuple):
    """(N,) each, of one dtype."""

    chosen: Tensor  # the rewards, c and r below
    rejected: Tensor
    margin: Tensor  # d below
    smoothing: float
    beta: float
    tau: float  # of discopop


def _sigmoid(pairs: _Pairs) -> Tensor:
    return -(1 - pairs.smoothing) * logsigmoid(pairs.margin) - pairs.smoothing * logsigmoid(-pairs.margin)


def _exo_pair(pairs: _Pairs) -> Tensor:
    chance, other = torch.sigmoid(pairs.margin), torch.sigmoid(-pairs.margin)
    wrong = math.log(pairs.smoothing)
    right = math.log1p(-pairs.smoothing)
    return chance * (logsigmoid(pairs.margin) - right) + other * (logsigmoid(-pairs.margin) - wrong)


def _robust(pairs: _Pairs) -> Tensor:
    clean, flipped = -logsigmoid(pairs.margin), -logsigmoid(-pairs.margin)
    return ((1 - pairs.smoothing) * clean - pairs.smoothing * flipped) / (1 - 2 * pairs.smoothing)


def _discopop(pairs: _Pairs) -> Tensor:
    """The exponential of the second part is joined with its weight, so that neither overflows for a large -d."""
    logistic = -logsigmoid(pairs.margin) * torch.sigmoid(-pairs.margin / pairs.tau)
    return logistic + torch.exp(logsigmoid(pairs.margin / pairs.tau) - pairs.margin)


_LOSSES: dict[str, Callable[[_Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "ipo": lambda pairs: ((pairs.margin - 0.5) / pairs.beta).square(),
    "hinge": lambda pairs: torch.relu(1 - pairs.margin),
    "robust": _robust,
    "exo_pair": _exo_pair,
    "apo_zero": lambda pairs: torch.sigmoid(-pairs.chosen) + torch.sigmoid(pairs.rejected),
    "apo_down": lambda pairs: torch.sigmoid(pairs.chosen) + torch.sigmoid(-pairs.margin),
    "nca_pair": lambda pairs: (
        -logsigmoid(pairs.chosen) - 0.5 * (logsigmoid(-pairs.chosen) + logsigmoid(-pairs.rejected))
    ),
    "bco_pair": lambda pairs: -logsigmoid(pairs.chosen) - logsigmoid(-pairs.rejected),
    "sppo_hard": lambda pairs: (
        ((pairs.chosen - 0.5) / pairs.beta).square() + ((pairs.rejected + 0.5) / pairs.beta).square()
    ),
    "discopop": _discopop,
}
_SMOOTHED = ("sigmoid", "robust", "exo_pair")
_WITH_MARGIN = ("sigmoid", "ipo", "hinge", "robust", "exo_pair", "apo_down", "discopop")
_WITH_DIVERGENCE = tuple(name for name in _WITH_MARGIN if name != "apo_down")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
HIGHEST_EXPONENT = 80.0  # e^80 is finite in float32


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    margin: float | Tensor = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    reduction: str = "mean",
) -> DPOLoss:
    """The mean preference loss over N pairs.

    c = beta (policy_chosen - ref_chosen) and r = beta (policy_rejected - ref_rejected) are the rewards of a pair,
    d = c - r - margin, e = label_smoothing.

    | loss_type | the loss of a pair                                        | source                              |
    |-----------|-----------------------------------------------------------|-------------------------------------|
    | sigmoid   | -(1 - e) log sigmoid(d) - e log sigmoid(-d)               | DPO, arXiv 2305.18290               |
    | ipo       | (d / beta - 1 / (2 beta))^2                               | IPO, arXiv 2310.12036, eq. 17       |
    | hinge     | max(0, 1 - d)                                             | SLiC, arXiv 2305.10425 (2309.06657) |
    | robust    | (-(1 - e) log sigmoid(d) + e log sigmoid(-d)) / (1 - 2 e) | rDPO, arXiv 2403.00409              |
    | exo_pair  | KL((sigmoid(d), sigmoid(-d)) to (1 - e, e)), e > 0        | EXO, arXiv 2402.00856, eq. 16       |
    | apo_zero  | sigmoid(-c) + sigmoid(r)                                  | APO, arXiv 2408.06266, eq. 7        |
    | apo_down  | sigmoid(c) + sigmoid(-d)                                  | APO, eq. 8                          |
    | nca_pair  | -log sigmoid(c) - (log sigmoid(-c) + log sigmoid(-r)) / 2 | NCA, arXiv 2402.05369               |
    | bco_pair  | -log sigmoid(c) - log sigmoid(-r)                         | BCO, arXiv 2404.04656, no shift     |
    | sppo_hard | ((c - 1/2) / beta)^2 + ((r + 1/2) / beta)^2               | SPPO, arXiv 2405.00675, sure labels |
    | discopop  | -sigmoid(-d/tau) log sigmoid(d) + sigmoid(d/tau) e^-d     | DiscoPOP, arXiv 2406.08414, eq. 5   |

    With another divergence than the reverse KL (f-DPO, arXiv 2309.16240), d = beta (s(t) - s(t')) - margin with the
    ratios t and t' of policy to reference of the two responses; c and r stay. The losses with d other than apo_down
    take it.

    | f_divergence_type | s(t) = f'(t), but for a constant                                       |
    |-------------------|------------------------------------------------------------------------|
    | reverse_kl        | log t                                                                  |
    | forward_kl        | -1 / t                                                                 |
    | js_divergence     | log(t / (1 + t))                                                       |
    | alpha_divergence  | (t^(a-1) - 1) / (a - 1), a = f_alpha_divergence_coef; log t at a = 1   |

    With e > 0, sigmoid is cDPO (Mitchell, "A note on DPO with noisy preferences", 2023).
    Without a reference (None for both) c and r are beta times the policy's log-probs. With these as means per token and
    a margin, sigmoid is SimPO (arXiv 2405.14734).

    Args:
        policy_chosen, policy_rejected: (N,) sequence log-probs under the policy, float: the sum over response tokens
            (for ipo some trainers use the mean instead; the formula is the same). Differentiable.
        ref_chosen, ref_rejected: (N,) the same under the reference; constants. None for both: there is no reference.
        beta: strength of the penalty on moving away from the reference, > 0.
        label_smoothing: the probability that a preference label is wrong, in [0, 0.5); for the losses with e.
        loss_type: a name of the table.
        margin: by how much the chosen reward should be larger, in units of reward: a number or (N,), a constant; for
            the losses with d.
        f_divergence_type: a name of the second table. A power t^x is bounded by e^80, where its slope is 0.
        f_alpha_divergence_coef: a in [0, 2], as TRL computes it: 0 is forward_kl, 1 reverse_kl, 2 half of chi squared.
            The paper's alpha is 1 - a.
        discopop_tau: tau, in (0, 1].
        reduction: "mean", or "none" for the loss of each pair, such as to weigh them.

    Returns:
        ``DPOLoss``, float32 (float64 when an input is); loss 0 with zero gradient when N is 0.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ, or are not (N,); an argument outside the ranges above.
    """
    op = "dpo_loss"
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError(f"{op}: ref_chosen and ref_rejected are both given or both None; got one of them")
    constants: Any = {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    if ref_chosen is None:
        constants = {}
    if not isinstance(margin, (int, float)):
        constants["margin"] = margin
    _checks.floating(op, policy_chosen=policy_chosen, policy_rejected=policy_rejected, **constants)
    if policy_chosen.dim() != 1:
        raise ValueError(f"{op}: policy_chosen must have shape (N,), one a pair; got {tuple(policy_chosen.shape)}")
    _checks.shaped(op, policy_chosen.shape, "that of policy_chosen", policy_rejected=policy_rejected, **constants)
    _checks.same_device(op, policy_chosen=policy_chosen, policy_rejected=policy_rejected, **constants)
    _checks.positive(op, beta=beta)
    _checks.one_of(op, "loss_type", loss_type, tuple(_LOSSES))
    _checks.one_of(op, "f_divergence_type", f_divergence_type, DIVERGENCES)
    _checks.positive(op, discopop_tau=discopop_tau)
    _checks.within(op, 0, 1, discopop_tau=discopop_tau)
    _checks.within(op, 0, 2, f_alpha_divergence_coef=f_alpha_divergence_coef)
    if f_divergence_type != "reverse_kl" and loss_type not in _WITH_DIVERGENCE:
        raise ValueError(
            f"{op}: f_divergence_type {f_divergence_type!r} is defined for loss_type {', '.join(_WITH_DIVERGENCE)}; "
            f"got {loss_type!r}"
        )
    _checks.one_of(op, "reduction", reduction, ("mean", "none"))
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{op}: label_smoothing must be in [0, 0.5); got {label_smoothing!r}")
    if label_smoothing > 0 and loss_type not in _SMOOTHED:
        raise ValueError(
            f"{op}: label_smoothing is defined for loss_type {', '.join(_SMOOTHED)}; got {loss_type!r}: set it to 0"
        )
    if label_smoothing == 0 and loss_type == "exo_pair":
        raise ValueError(f"{op}: loss_type 'exo_pair' needs label_smoothing > 0; got {label_smoothing!r}")
    if ("margin" in constants or margin != 0) and loss_type not in _WITH_MARGIN:
        raise ValueError(f"{op}: margin is defined for loss_type {', '.join(_WITH_MARGIN)}; got {loss_type!r}")

    constants = {name: _checks.constant(value) for name, value in constants.items()}
    names = ("policy_chosen", "policy_rejected", *constants)
    inputs: Any = dict(zip(names, upcast(policy_chosen, policy_rejected, *constants.values()), strict=True))
    return implementation(op, policy_chosen)(
        **{"ref_chosen": 0.0, "ref_rejected": 0.0, "margin": margin} | inputs,
        beta=beta, label_smoothing=label_smoothing, loss_type=loss_type, reduction=reduction,
        f_divergence_type=f_divergence_type, alpha=f_alpha_divergence_coef, tau=discopop_tau,
    )  # fmt: skip


@implements("dpo_loss", "torch")
def _torch(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor | float,
    ref_rejected: Tensor | float,
    margin: Tensor | float,
    beta: float,
    label_smoothing: float,
    loss_type: str,
    reduction: str,
    f_divergence_type: str,
    alpha: float,
    tau: float,
) -> DPOLoss:
    """All tensors (N,), one dtype; 0 in place of an absent reference."""
    log_ratios = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    chosen, rejected = (beta * log_ratio for log_ratio in log_ratios)
    better, worse = (beta * _score(log_ratio, f_divergence_type, alpha) for log_ratio in log_ratios)
    losses = _LOSSES[loss_type](_Pairs(chosen, rejected, better - worse - margin, label_smoothing, beta, tau))
    return DPOLoss(
        loss=losses if reduction == "none" else masked_mean(losses, None),
        chosen_rewards=chosen.detach(),
        rejected_rewards=rejected.detach(),
        accuracy=masked_mean((chosen > rejected).to(losses.dtype), None),
    )


def _score(log_ratio: Tensor, f_divergence_type: str, alpha: float) -> Tensor:
    """f'(t) but for a constant, which cancels, from log t."""
    if f_divergence_type == "js_divergence":
        return logsigmoid(log_ratio)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha_divergence": alpha - 1}[f_divergence_type]
    if power == 0:
        return log_ratio
    return torch.expm1((power * log_ratio).clamp(max=HIGHEST_EXPONENT)) / power
