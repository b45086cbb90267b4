"""Direct preference optimisation (DPO), IPO and hinge (SLiC) losses of sequence log-probs."""

from typing import NamedTuple

import torch

from rlhf_fast.ops import _checks
from rlhf_fast.ops._aggregate import masked_mean, upcast
from rlhf_fast.ops._dispatch import implementation, implements


class DPOLoss(NamedTuple):
    """On the device of the inputs. All but ``loss`` are statistics, without gradient."""

    loss: torch.Tensor  # 0-dim
    chosen_rewards: torch.Tensor  # (N,) beta * (policy_chosen - ref_chosen)
    rejected_rewards: torch.Tensor  # (N,) beta * (policy_rejected - ref_rejected)
    accuracy: torch.Tensor  # 0-dim, the share of pairs with chosen reward > rejected reward


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> DPOLoss:
    """The mean preference loss over N pairs, with h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected).

    | loss_type | the loss of a pair                                                                                  |
    |-----------|-----------------------------------------------------------------------------------------------------|
    | sigmoid   | -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing (DPO, arXiv 2305.18290)  |
    | ipo       | (h - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, eq. 17)                                                |
    | hinge     | max(0, 1 - beta h) (SLiC, arXiv 2305.10425, in the form of arXiv 2309.06657)                        |

    With e > 0, sigmoid is cDPO (Mitchell, "A note on DPO with noisy preferences", 2023).

    Args:
        policy_chosen, policy_rejected: (N,) sequence log-probs under the policy, float: the sum over response tokens
            (for ipo some trainers use the mean instead; the formula is the same). Differentiable.
        ref_chosen, ref_rejected: (N,) the same under the reference; constants.
        beta: strength of the penalty on moving away from the reference, > 0.
        label_smoothing: the probability that a preference label is wrong, in [0, 0.5); only for sigmoid.
        loss_type: a name of the table.

    Returns:
        ``DPOLoss``, float32 (float64 when an input is); loss 0 with zero gradient when N is 0.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ, or are not (N,); an argument outside the ranges above.
    """
    op = "dpo_loss"
    constants = {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    _checks.floating(op, policy_chosen=policy_chosen, policy_rejected=policy_rejected, **constants)
    if policy_chosen.dim() != 1:
        raise ValueError(f"{op}: policy_chosen must have shape (N,), one a pair; got {tuple(policy_chosen.shape)}")
    _checks.shaped(op, policy_chosen.shape, "that of policy_chosen", policy_rejected=policy_rejected, **constants)
    _checks.same_device(op, policy_chosen=policy_chosen, policy_rejected=policy_rejected, **constants)
    _checks.positive(op, beta=beta)
    _checks.one_of(op, "loss_type", loss_type, ("sigmoid", "ipo", "hinge"))
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{op}: label_smoothing must be in [0, 0.5); got {label_smoothing!r}")
    if label_smoothing > 0 and loss_type != "sigmoid":
        raise ValueError(f"{op}: label_smoothing is defined for loss_type 'sigmoid' alone; got {loss_type!r}")

    inputs = upcast(policy_chosen, policy_rejected, _checks.constant(ref_chosen), _checks.constant(ref_rejected))
    return implementation(op, policy_chosen)(*inputs, beta, label_smoothing, loss_type)


@implements("dpo_loss", "torch")
def _torch(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    label_smoothing: float,
    loss_type: str,
) -> DPOLoss:
    """All tensors (N,), one dtype."""
    chosen = policy_chosen - ref_chosen
    rejected = policy_rejected - ref_rejected
    h = chosen - rejected
    if loss_type == "sigmoid":
        logsigmoid = torch.nn.functional.logsigmoid
        losses = -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)).square()
    else:
        losses = torch.relu(1 - beta * h)
    return DPOLoss(
        loss=masked_mean(losses, None),
        chosen_rewards=beta * chosen.detach(),
        rejected_rewards=beta * rejected.detach(),
        accuracy=masked_mean((chosen > rejected).to(h.dtype), None),
    )
