"""The KTO loss: preferences without pairs."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._aggregate import masked_mean, upcast


class KTOLoss(NamedTuple):
    """On the device of the inputs."""

    loss: Tensor  # 0-dim, or (N,) with reduction "none"
    rewards: Tensor  # (N,) beta * (policy - ref), without gradient


def kto_loss(
    policy: Tensor,
    ref: Tensor,
    desirable: Tensor,
    kl: float | Tensor = 0.0,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> KTOLoss:
    """The mean over N responses of weight * sigmoid(-s beta (policy - ref - kl)), s = 1 if desirable, else -1 (KTO,
    arXiv 2402.01306, eq. 8, without its constant).

    With kl = 0 and both weights 1 it is the unpaired form of APO-zero (arXiv 2408.06266).

    Args:
        policy: (N,) sequence log-probs of the responses under the policy, float. Differentiable.
        ref: (N,) the same under the reference; a constant.
        desirable: (N,) bool, True = a response that should become more likely.
        kl: the estimate of KL(policy || ref), a number or 0-dim, used as a constant. The paper's is the mean of
            policy - ref over prompts with the responses of other prompts, and at least 0.
        beta: strength of the penalty on moving away from the reference, > 0.
        desirable_weight, undesirable_weight: weights of the two kinds, >= 0.
        reduction: "mean", or "none" for the loss of each response.

    Returns:
        ``KTOLoss``, float32 (float64 when an input is); loss 0 with zero gradient when N is 0.

    Raises:
        TypeError: an input is not a tensor of the dtype above.
        ValueError: shapes or devices differ, or are not (N,); an argument outside the ranges above.
    """
    op = "kto_loss"
    _checks.floating(op, policy=policy, ref=ref)
    if policy.dim() != 1:
        raise ValueError(f"{op}: policy must have shape (N,), one a response; got {tuple(policy.shape)}")
    _checks.is_tensor(op, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise TypeError(f"{op}: desirable must be bool; got {desirable.dtype}: pass desirable == 1")
    _checks.shaped(op, policy.shape, "that of policy", ref=ref, desirable=desirable)
    _checks.same_device(op, policy=policy, ref=ref, desirable=desirable)
    _checks.positive(op, beta=beta)
    _checks.non_negative(op, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    _checks.one_of(op, "reduction", reduction, ("mean", "none"))
    if isinstance(kl, Tensor):
        _checks.floating(op, kl=kl)
        if kl.dim() != 0:
            raise ValueError(f"{op}: kl must be a number or a 0-dim tensor; got shape {tuple(kl.shape)}")
        kl = _checks.constant(kl)

    policy, ref = upcast(policy, _checks.constant(ref))
    log_ratio = policy - ref
    rise = beta * (log_ratio - kl)
    losses = torch.where(desirable, desirable_weight * torch.sigmoid(-rise), undesirable_weight * torch.sigmoid(rise))
    return KTOLoss(losses if reduction == "none" else masked_mean(losses, None), beta * log_ratio.detach())
