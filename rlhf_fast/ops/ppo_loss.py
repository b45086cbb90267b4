"""PPO's joint loss: policy, value, entropy and KL."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._aggregate import check_aggregation, reduced, scalar_tensor, upcast
from ._dispatch import implementation, implements
from ._losses import LossInputs, check_reference, policy_terms, value_terms
from .clipped_policy_loss import reference as policy_reference
from .clipped_value_loss import reference as value_reference
from .token_kl import estimates


class PPOLoss(NamedTuple):
    """0-dim tensors on the device of the inputs; all but ``loss`` without gradient."""

    loss: Tensor  # policy_loss + value_coef * value_loss + kl_coef * kl - entropy_coef * entropy
    policy_loss: Tensor
    value_loss: Tensor
    kl: Tensor  # aggregated like the loss; 0 without ref_logprobs
    entropy: Tensor  # aggregated like the loss, nats; 0 where it is not given
    clip_fraction: Tensor  # this and the next four as in PolicyLoss
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    ratio_var: Tensor
    value_clip_fraction: Tensor  # ValueLoss's clip_fraction


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> PPOLoss:
    """Clipped policy loss + value_coef * clipped value loss + kl_coef * KL - entropy_coef * entropy, each with the same
    aggregation.

    A term of weight 0 is computed but not added: its NaN does not reach the loss, and its inputs get no gradient.

    Args:
        logprobs: (B, T), or any shape with token-mean; float.
        old_logprobs: same shape; log-probs of the policy that sampled; a constant. None: it is this policy.
        advantages: same shape; positive for tokens that were better than expected; a constant.
        values: same shape; float.
        old_values: same shape; the critic's values when the tokens were sampled; a constant.
        returns: same shape; the values' targets, such as the returns of ``gae``; a constant.
        mask: same shape, bool or 0/1, 1 = counts. Masked tokens are not read and get gradient 0.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        entropy: same shape, nats, for the entropy bonus. Differentiable, as are logprobs and values.
        ref_logprobs: same shape; log-probs of the reference, for the KL term; a constant.
        clip_low, clip_high, dual_clip: as in ``clipped_policy_loss``, with token-level ratios.
        value_clip: the clip of ``clipped_value_loss``; None does not clip.
        value_coef, entropy_coef, kl_coef: weights of the terms, >= 0.
        kl_estimator: see ``token_kl`` for the estimators and their gradients.
        aggregation, num_items: see ``aggregate``; fractions, ratios and approx_kl are means over this call's tokens.

    Returns:
        ``PPOLoss``, float32 (float64 when an input is), all 0 when nothing is live.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges above; a weight > 0 without its data.
    """
    op = "ppo_loss"
    data = {
        "logprobs": logprobs, "old_logprobs": logprobs if old_logprobs is None else old_logprobs,
        "advantages": advantages, "values": values, "old_values": old_values, "returns": returns,
    }  # fmt: skip
    if entropy is not None:
        data["entropy"] = entropy
    if ref_logprobs is not None:
        data["ref_logprobs"] = ref_logprobs
    _checks.alike(op, "that of logprobs", **data)
    terms = policy_terms(
        op, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_coef=kl_coef, kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
    )  # fmt: skip
    of_value = value_terms(op, "value_", clip=value_clip, coef=value_coef)
    check_reference(op, ref_logprobs, kl_coef)
    if entropy_coef > 0 and entropy is None:
        raise ValueError(f"{op}: entropy_coef={entropy_coef!r} needs entropy, which is None; pass it or set it to 0")
    check_aggregation(op, logprobs, aggregation, num_items)
    live = _checks.live_mask(op, mask, logprobs.shape, logprobs.device)

    trained = {"logprobs"} | {name for name, coef in (("values", value_coef), ("entropy", entropy_coef)) if coef > 0}
    inputs = [tensor if name in trained else _checks.constant(tensor) for name, tensor in data.items()]
    given: Any = dict(zip(data, upcast(*inputs), strict=True))
    loss, statistics = implementation(op, given["logprobs"])(
        LossInputs(
            **given,
            live=live,
            terms=terms,
            value_terms=of_value,
            aggregation=aggregation,
            num_items=scalar_tensor(num_items),
        )
    )
    return PPOLoss(loss, *statistics)


@implements("ppo_loss", "torch")
def _torch(inputs: LossInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-> the loss, and the other fields of PPOLoss."""
    loss, (policy, kl, entropy, *of_policy) = with_terms(inputs, *policy_reference(inputs))
    value, of_value = value_reference(inputs)
    if inputs.value_terms.coef > 0:
        loss = loss + inputs.value_terms.coef * value
    return loss, (policy, value.detach(), kl, entropy, *of_policy, *of_value)


def with_terms(
    inputs: LossInputs, policy: Tensor, of_policy: tuple[Tensor, ...], exact_kl: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A policy loss with its KL and entropy terms -> the loss, and policy_loss, kl, entropy and ``of_policy``.

    The KL is ``exact_kl``, of each token, or the estimate from ``inputs.ref_logprobs``. A term of weight 0 is not in
    the graph, so the backward does not compute it.
    """
    terms, logprobs, live = inputs.terms, inputs.logprobs, inputs.live
    loss, entropy = policy, torch.zeros_like(of_policy[0])
    kl = entropy

    def aggregated(values: Tensor) -> Tensor:
        return reduced(values, live, aggregation=inputs.aggregation, num_items=inputs.num_items)

    if inputs.entropy is not None:
        entropy = aggregated(inputs.entropy)
    if terms.entropy_coef > 0:
        loss = loss - terms.entropy_coef * entropy
    if exact_kl is not None:
        kl = aggregated(exact_kl)
    elif inputs.ref_logprobs is not None:
        kl = aggregated(estimates(logprobs, inputs.ref_logprobs, live, terms.kl, terms.kl_slope))
    if terms.kl_coef > 0:
        loss = loss + terms.kl_coef * kl
    return loss, (policy.detach(), kl.detach(), entropy.detach(), *of_policy)
