"""PPO's joint loss: policy, value, entropy and KL."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._aggregate import as_rows, check_aggregation, upcast
from ._dispatch import implementation, implements
from .clipped_policy_loss import check_ratios
from .clipped_value_loss import clipped_value_loss
from .linear_policy_loss import check_terms, from_logprobs


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
    old_logprobs: Tensor,
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
    """Clipped policy loss + value_coef * clipped value loss + kl_coef * KL - entropy_coef * entropy, aggregated alike.

    A term of weight 0 is measured and stays out of the loss: its NaN does not show there, its data gets no gradient.

    Args:
        logprobs: (B, T), or any shape with token-mean; float.
        old_logprobs: same shape; log-probs of the policy that sampled; a constant.
        advantages: same shape; above 0 the token was better than expected; a constant.
        values: same shape; float.
        old_values: same shape; what the critic said when the tokens were sampled; a constant.
        returns: same shape; the values' targets, such as the returns of ``gae``; a constant.
        mask: same shape, bool or 0/1, 1 = counts. Masked tokens are not read and get gradient 0.
            A value other than 0 and 1 is an error on the CPU; on a GPU, where asking would wait, it counts as 1.
        entropy: same shape, nats, for the entropy bonus. The gradient goes here, to logprobs and to values.
        ref_logprobs: same shape; log-probs of the reference, for the KL term; a constant.
        clip_low, clip_high, dual_clip: as in ``clipped_policy_loss``, whose ratios are by the token here.
        value_clip: the clip of ``clipped_value_loss``; None does not clip.
        value_coef, entropy_coef, kl_coef: weights of the terms, >= 0.
        kl_estimator: see ``token_kl``, which says what the gradient of each is worth.
        aggregation, num_items: see ``rlhf_fast.ops._aggregate.aggregate``; fractions, ratios and approx_kl are means
            over this call's tokens.

    Returns:
        ``PPOLoss``, float32 (float64 when an input is), all 0 when nothing is live.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; an argument outside the ranges above; a weight without its data.
    """
    op = "ppo_loss"
    data = {
        "logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "values": values,
        "old_values": old_values, "returns": returns,
    }  # fmt: skip
    if entropy is not None:
        data["entropy"] = entropy
    if ref_logprobs is not None:
        data["ref_logprobs"] = ref_logprobs
    _checks.floating(op, **data)
    _checks.shaped(op, logprobs.shape, "that of logprobs", **data)
    _checks.same_device(op, **data)
    check_ratios(op, logprobs, clip_low, clip_high, dual_clip, "token")
    _checks.positive(op, value_clip=value_clip)
    _checks.non_negative(op, value_coef=value_coef)
    check_terms(op, ref_logprobs, kl_coef, kl_estimator, entropy_coef)
    if entropy_coef > 0 and entropy is None:
        raise ValueError(f"{op}: entropy_coef={entropy_coef!r} needs entropy, which is None; pass it or set it to 0")
    check_aggregation(op, logprobs, aggregation, num_items)
    live = _checks.live_mask(op, mask, logprobs.shape, logprobs.device)

    trained = {"logprobs"} | {name for name, coef in (("values", value_coef), ("entropy", entropy_coef)) if coef > 0}
    inputs = [tensor if name in trained else _checks.constant(tensor) for name, tensor in data.items()]
    rows = dict(zip(data, map(as_rows, upcast(*inputs)), strict=True))
    return implementation(op, rows["logprobs"])(
        **rows,
        live=None if live is None else as_rows(live),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        value_clip=value_clip,
        value_coef=value_coef,
        entropy_coef=entropy_coef,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        aggregation=aggregation,
        num_items=num_items,
    )


@implements("ppo_loss", "torch")
def _torch(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    live: Tensor | None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    aggregation: str,
    num_items: float | Tensor | None,
) -> PPOLoss:
    """Tensors (B, T), one dtype."""
    if live is None:
        live = torch.ones_like(logprobs, dtype=torch.bool)
    policy = from_logprobs(
        logprobs,
        entropy,
        live,
        old_logprobs,
        advantages,
        ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio_level="token",
        aggregation=aggregation,
        num_items=num_items,
    )
    value = clipped_value_loss(
        values, old_values, returns, live, clip=value_clip, aggregation=aggregation, num_items=num_items
    )
    return PPOLoss(
        loss=policy.loss + value_coef * value.loss if value_coef > 0 else policy.loss,
        value_loss=value.loss.detach(),
        value_clip_fraction=value.clip_fraction,
        **{name: statistic for name, statistic in policy._asdict().items() if name != "loss"},
    )
