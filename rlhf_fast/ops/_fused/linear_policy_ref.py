"""linear_policy_ref on fused kernels: two tiles of logits side by side, policy's and reference's, folded together."""

from typing import Any

import torch
from torch import Tensor

from .._dispatch import implements
from .._launch import launch
from ._linear import HeadGradients, LinearHead, empty_gradients, sweep, wanted_dtypes
from ._live import LiveRows
from ._op import fused_op
from ._rows import logits_arguments


@implements("linear_policy_ref", "native", "triton", "cuda")
def fused(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(hidden, ref_hidden, weight, bias, targets, live, temperature, softcap or 0.0)


def _kernel(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the fields of PolicyRef, each (N,)."""
    rows = LiveRows(live, targets, temperature, softcap)
    results = hidden.new_empty(4, rows.count, dtype=torch.float32)
    _fold_all(rows, hidden, ref_hidden, weight, bias, results, (), [False] * 5)
    logprobs, ref_logprobs, entropy, kl = (rows.put(result.clone()) for result in results)
    return logprobs, ref_logprobs, entropy, kl


def _fold_all(
    rows: LiveRows,
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    results: Tensor,
    slopes: tuple[Tensor, ...],
    wants: list[bool],
) -> HeadGradients:
    """``slopes``, if any, are the gradients (live,) of logprobs, entropy and KL."""

    def fold(part: slice, logits: tuple[Tensor, ...], grad: Tensor | None) -> None:
        policy, reference = logits
        launch(
            "linear_policy_ref", *rows.arguments(part, policy),
            reference, reference.stride(0), *(result[part] for result in results), *logits_arguments(grad),
            *([slope[part] for slope in slopes] if slopes else [None] * 3),
        )  # fmt: skip

    head = LinearHead(weight, bias, None, None, 0.0)
    return sweep(head, (rows.take(hidden), rows.take(ref_hidden)), fold, wants)


def _fake(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4))


def _backward_kernel(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    grad_kl: Tensor,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of hidden, weight and bias, from logits that are formed once more."""
    rows = LiveRows(live, targets, temperature, softcap)
    unused = hidden.new_empty(4, rows.count, dtype=torch.float32)
    slopes = tuple(rows.take(grad) for grad in (grad_logprobs, grad_entropy, grad_kl))
    grads = _fold_all(rows, hidden, ref_hidden, weight, bias, unused, slopes, [*wants, False, False])
    return rows.put(grads.hidden) if wants[0] else grads.hidden, grads.weight, grads.bias


def _backward_fake(hidden: Tensor, _: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, LinearHead(weight, bias, None, None, 0.0), [*rest[-1], False, False])[:3]


_backward = fused_op("linear_policy_ref_backward", _backward_kernel, _backward_fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softcap = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors)


def _gradient(
    ctx: Any, grad_logprobs: Tensor, grad_ref: Tensor, grad_entropy: Tensor, grad_kl: Tensor
) -> tuple[Tensor | None, ...]:
    wants = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
    found = _backward(*ctx.saved_tensors, ctx.softcap, grad_logprobs, grad_entropy, grad_kl, wants)
    hidden, _, weight, bias, *_ = ctx.saved_tensors
    dtypes = wanted_dtypes(hidden, LinearHead(weight, bias, None, None, 0.0), [*wants, False, False])
    grads = [None if dtype is None else grad.to(dtype) for grad, dtype in zip(found, dtypes[:3], strict=True)]
    return grads[0], None, *grads[1:], *(None,) * 4


_forward = fused_op("linear_policy_ref", _kernel, _fake, save=_save, gradient=_gradient)
