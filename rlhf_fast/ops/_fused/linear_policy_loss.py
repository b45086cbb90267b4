"""linear_policy_loss on fused kernels: one sweep from hidden states to loss and gradient. With ratios by the token each
token's share of the gradient is known once its log-prob is, while its logits are still there.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .._aggregate import scalar_tensor, token_weights
from .._dispatch import implements
from .._launch import launch
from .._linear import LoRA
from .._tokens import Tokens
from ..linear_policy_loss import LinearPolicyLoss, from_logprobs
from ._linear import LinearHead, empty_gradients, flat_head, scaled, sweep, wanted, wanted_dtypes
from ._live import LiveRows
from ._op import fused_op
from ._rows import logits_arguments
from .linear_logprobs import fused as linear_logprobs
from .token_kl import kl_codes


@implements("linear_policy_loss", "native", "triton", "cuda")
def fused(
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
    loss: dict[str, Any] = {
        "kl_coef": kl_coef, "kl_estimator": kl_estimator, "entropy_coef": entropy_coef, "clip_low": clip_low,
        "clip_high": clip_high, "dual_clip": dual_clip, "aggregation": aggregation, "num_items": num_items,
    }  # fmt: skip
    if ratio_level == "sequence":  # a token's share is known after the last log-prob of its sequence
        logprobs, entropies = linear_logprobs(
            hidden, weight, bias, lora, *tokens, softcap, True, ahead=entropy_coef == 0
        )
        assert entropies is not None  # they were asked for
        return from_logprobs(
            logprobs, entropies, tokens.live, old_logprobs, advantages, ref_logprobs, ratio_level=ratio_level, **loss
        )
    head = flat_head(weight, bias, lora)
    loss["num_items"] = scalar_tensor(num_items, hidden.device)
    total, statistics, *_ = _forward(
        hidden, *head, *tokens, softcap or 0.0, old_logprobs, advantages, ref_logprobs, *loss.values(),
        wanted(hidden, head),
    )  # fmt: skip
    return LinearPolicyLoss(total, *statistics.unbind())


def _kernel(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    aggregation: str,
    num_items: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the loss (), the other fields of LinearPolicyLoss (8,), and the loss's gradients as in HeadGradients."""
    rows = LiveRows(live, targets, temperature, softcap)
    weights = token_weights(live.reshape(old_logprobs.shape), aggregation=aggregation, num_items=num_items)

    def tokens(tensor: Tensor) -> Tensor:
        return rows.take(tensor.reshape(-1))

    old, advantage, share = tokens(old_logprobs), tokens(advantages), tokens(weights)
    # without a KL term the kernel reads no reference
    ref = tokens(ref_logprobs) if ref_logprobs is not None and kl_coef > 0 else None
    logprobs, entropies = torch.empty_like(old), torch.empty_like(old)

    def fold(part: slice, logits: tuple[Tensor, ...], grad: Tensor | None) -> None:
        launch(
            "linear_policy_loss", *rows.arguments(part, logits[0]), old[part], advantage[part],
            None if ref is None else ref[part], share[part], clip_low, clip_high,
            math.inf if dual_clip is None else dual_clip, kl_coef, entropy_coef, kl_codes(kl_estimator)[1],
            *logits_arguments(grad), logprobs[part], entropies[part],
        )  # fmt: skip

    grads = sweep(LinearHead(weight, bias, down, up, scale), (rows.take(hidden),), fold, wants)
    total, *statistics = from_logprobs(
        rows.put(logprobs), rows.put(entropies), live, old_logprobs, advantages, ref_logprobs, kl_coef=kl_coef,
        kl_estimator=kl_estimator, entropy_coef=entropy_coef, clip_low=clip_low, clip_high=clip_high,
        dual_clip=dual_clip, ratio_level="token", aggregation=aggregation, num_items=num_items,
    )  # fmt: skip
    return total, torch.stack(statistics), rows.put(grads.hidden) if wants[0] else grads.hidden, *grads[1:]


def _fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    statistics = hidden.new_empty(len(LinearPolicyLoss._fields) - 1, dtype=torch.float32)
    return statistics.new_empty(()), statistics, *empty_gradients(hidden, LinearHead(*rest[:5]), rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, *head = inputs[:6]
    ctx.dtypes = wanted_dtypes(hidden, LinearHead(*head), inputs[-1])
    ctx.others = len(inputs) - len(ctx.dtypes)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _gradient(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *scaled(grad_total, ctx.saved_tensors, ctx.dtypes), *(None,) * ctx.others


_forward = fused_op("linear_policy_loss", _kernel, _fake, save=_save, gradient=_gradient)
