"""PPO's policy loss, with KL and entropy terms, straight from hidden states."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._aggregate import aggregate, check_aggregation
from ._dispatch import implementation, implements
from ._linear import LoRA, checked_head, flat_hidden
from ._tokens import Tokens, flat_tokens
from ._vocab import accumulation_dtype
from .clipped_policy_loss import check_ratios, clipped_policy_loss
from .linear_logprobs import reference as linear_logprobs_reference
from .token_kl import ESTIMATORS, token_kl


class LinearPolicyLoss(NamedTuple):
    """0-dim tensors on the device of the inputs; all but ``loss`` without gradient."""

    loss: Tensor  # policy_loss + kl_coef * kl - entropy_coef * entropy
    policy_loss: Tensor
    kl: Tensor  # aggregated like the loss; 0 without ref_logprobs
    entropy: Tensor  # aggregated like the loss, nats
    clip_fraction: Tensor  # this and the rest as in PolicyLoss
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    ratio_var: Tensor


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> LinearPolicyLoss:
    """Clipped policy loss + kl_coef * KL - entropy_coef * entropy, each aggregated alike. Logits never exist whole.

    Args:
        hidden: (..., H), or (B, T, H) where ``aggregation`` or ``ratio_level`` counts sequences.
        weight: (V, H), dtype of hidden; inside torch.autocast both are cast to its dtype, as F.linear does. Frozen, it
            costs no gradient product of its own.
        targets: (...), integer token ids. Nothing is shifted here: row t is the state that predicts target t.
        old_logprobs: (...), log-probs of the policy that sampled; a constant.
        advantages: (...), above 0 the token was better than expected; a constant.
        mask: (...), bool or 0/1, 1 = counts. Masked tokens are not computed, and their data is never used.
            A value other than 0 and 1 is an error on the CPU; on a GPU, where asking would wait, it counts as 1.
        ref_logprobs: (...), log-probs of the reference, for the KL term; a constant. Without it there is no KL term.
        kl_coef: weight of the KL term, >= 0.
        kl_estimator: see ``token_kl``, which says what the gradient of each is worth.
        entropy_coef: weight of the entropy bonus, >= 0.
        bias, lora, temperature, softcap, vocab_size, ignore_index: as in ``linear_logprobs``.
        clip_low, clip_high, dual_clip, ratio_level, aggregation, num_items: as in ``clipped_policy_loss``.

    Returns:
        ``LinearPolicyLoss``, float32 (float64 for float64 hidden), all 0 when nothing is live.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or value.
        IndexError: on the CPU, a live target outside the vocabulary; on a GPU its row is NaN.
    """
    op = "linear_policy_loss"
    hidden, head = checked_head(op, hidden, weight, bias, lora, vocab_size)
    _checks.positive(op, softcap=softcap)
    check_terms(op, ref_logprobs, kl_coef, kl_estimator, entropy_coef)
    shape = hidden.shape[:-1]
    given = {"old_logprobs": old_logprobs, "advantages": advantages}
    if ref_logprobs is not None:
        given["ref_logprobs"] = ref_logprobs
    _checks.floating(op, **given)
    _checks.shaped(op, shape, "the leading shape of hidden", **given)
    _checks.same_device(op, hidden=hidden, **given)
    check_ratios(op, old_logprobs, clip_low, clip_high, dual_clip, ratio_level)
    check_aggregation(op, old_logprobs, aggregation, num_items)
    dtype = accumulation_dtype(hidden.dtype)
    tokens = flat_tokens(
        op, hidden, targets, mask, temperature=temperature, vocab=head.weight.shape[0], ignore_index=ignore_index
    )
    return implementation(op, hidden)(
        flat_hidden(hidden),
        *head,
        tokens,
        _checks.constant(old_logprobs).to(dtype),
        _checks.constant(advantages).to(dtype),
        None if ref_logprobs is None else _checks.constant(ref_logprobs).to(dtype),
        softcap=softcap,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio_level=ratio_level,
        aggregation=aggregation,
        num_items=num_items,
    )


def check_terms(op: str, ref_logprobs: Tensor | None, kl_coef: float, kl_estimator: str, entropy_coef: float) -> None:
    """The terms beside the policy loss can be formed."""
    _checks.non_negative(op, kl_coef=kl_coef, entropy_coef=entropy_coef)
    _checks.one_of(op, "kl_estimator", kl_estimator, ESTIMATORS)
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"{op}: kl_coef={kl_coef!r} needs ref_logprobs, which is None; pass them or set kl_coef=0")


@implements("linear_policy_loss", "torch")
def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    tokens: Tokens,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    *,
    softcap: float | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_level: str,
    aggregation: str,
    num_items: float | Tensor | None,
) -> LinearPolicyLoss:
    """hidden (N, H), weight (V, H), tokens of N; the other tensors keep their leading shape, of N elements."""
    logprobs, entropies = linear_logprobs_reference(hidden, weight, bias, lora, *tokens, softcap, True)
    assert entropies is not None  # they were asked for
    return from_logprobs(
        logprobs,
        entropies,
        tokens.live,
        old_logprobs,
        advantages,
        ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio_level=ratio_level,
        aggregation=aggregation,
        num_items=num_items,
    )


def from_logprobs(
    logprobs: Tensor,
    entropies: Tensor | None,
    live: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    *,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_level: str,
    aggregation: str,
    num_items: float | Tensor | None,
) -> LinearPolicyLoss:
    """logprobs, entropies and live (N,); the other tensors keep their leading shape, of N elements."""
    shape = old_logprobs.shape
    logprobs, live = logprobs.reshape(shape), live.reshape(shape)

    policy = clipped_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        live,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio_level=ratio_level,
        aggregation=aggregation,
        num_items=num_items,
    )
    loss = policy.loss
    # A term of weight 0 stays out of the graph, and so costs nothing in the backward.
    entropy = kl = torch.zeros_like(policy.approx_kl)
    if entropies is not None:
        entropy = aggregate(entropies.reshape(shape), live, aggregation=aggregation, num_items=num_items)
    if entropy_coef > 0:
        loss = loss - entropy_coef * entropy
    if ref_logprobs is not None:
        kl = aggregate(
            token_kl(logprobs, ref_logprobs, live, estimator=kl_estimator),
            live,
            aggregation=aggregation,
            num_items=num_items,
        )
    if kl_coef > 0:
        loss = loss + kl_coef * kl
    return LinearPolicyLoss(
        loss,
        policy.loss.detach(),
        kl.detach(),
        entropy.detach(),
        policy.clip_fraction,
        policy.approx_kl,
        policy.ratio_mean,
        policy.ratio_max,
        policy.ratio_var,
    )
