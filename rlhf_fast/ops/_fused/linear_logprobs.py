"""linear_logprobs on fused kernels. With a frozen head the gradient of every row's log-prob is formed in the forward,
out of the logits that are there anyway, and the backward only scales it: two matrix products in all.
"""

from typing import Any

import torch
from torch import Tensor

from .._dispatch import implements
from .._launch import launch
from .._linear import LoRA
from ._linear import LinearHead, empty_gradients, flat_head, sweep, wanted, wanted_dtypes
from ._live import LiveRows
from ._op import fused_op
from ._rows import logits_arguments


@implements("linear_logprobs", "native", "triton", "cuda")
def fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float | None,
    return_entropy: bool,
    *,
    ahead: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``ahead`` allows the gradient to be formed in the forward, which is for nothing where the entropy has one too."""
    head = flat_head(weight, bias, lora)
    wants = wanted(hidden, head)
    ahead = ahead and wants[0] and not any(wants[1:])
    logprobs, entropy, _ = _forward(hidden, *head, targets, live, temperature, softcap or 0.0, return_entropy, ahead)
    return logprobs, entropy if return_entropy else None


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
    return_entropy: bool,
    ahead: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> logprobs (N,), entropy (N,) or (0,), and d logprobs / d hidden (N, H) where formed ``ahead``, else (0,)."""
    rows = LiveRows(live, targets, temperature, softcap)
    logprobs = hidden.new_empty(rows.count, dtype=torch.float32)
    entropy = hidden.new_empty(rows.count if return_entropy else 0, dtype=torch.float32)

    def fold(part: slice, logits: tuple[Tensor, ...], grad: Tensor | None) -> None:
        arguments = rows.arguments(part, logits[0])
        launch(
            "linear_logprobs",
            *arguments,
            logprobs[part],
            entropy[part] if return_entropy else None,
            *logits_arguments(grad),
            None,
            None,
        )

    head = LinearHead(weight, bias, down, up, scale)
    slopes = sweep(head, (rows.take(hidden),), fold, [ahead, False, False, False, False]).hidden
    return rows.put(logprobs), rows.put(entropy) if return_entropy else entropy, rows.put(slopes) if ahead else slopes


def _fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, (return_entropy, ahead) = hidden.shape[0], rest[-2:]
    return (
        hidden.new_empty(rows, dtype=torch.float32),
        hidden.new_empty(rows if return_entropy else 0, dtype=torch.float32),
        empty_gradients(hidden, LinearHead(*rest[:5]), [ahead, False, False, False, False]).hidden,
    )


def _backward_kernel(
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
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of HeadGradients, from logits that are formed once more."""
    rows = LiveRows(live, targets, temperature, softcap)
    slopes = rows.take(grad_logprobs)
    entropy_slopes = None if grad_entropy is None else rows.take(grad_entropy)
    unused = hidden.new_empty(rows.count, dtype=torch.float32)

    def fold(part: slice, logits: tuple[Tensor, ...], grad: Tensor | None) -> None:
        last = None if entropy_slopes is None else entropy_slopes[part]
        arguments = rows.arguments(part, logits[0])
        launch("linear_logprobs", *arguments, unused[part], None, *logits_arguments(grad), slopes[part], last)

    grads = sweep(LinearHead(weight, bias, down, up, scale), (rows.take(hidden),), fold, wants)
    return grads._replace(hidden=rows.put(grads.hidden)) if wants[0] else grads


def _backward_fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, LinearHead(*rest[:5]), rest[-1])


_backward = fused_op("linear_logprobs_backward", _backward_kernel, _backward_fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, *head, ctx.scale, targets, live, temperature, ctx.softcap, ctx.return_entropy, ctx.ahead = inputs
    ctx.dtype = hidden.dtype
    ctx.mark_non_differentiable(*output[2 if ctx.return_entropy else 1 :])
    ctx.set_materialize_grads(False)
    # the entropy's gradient, where one comes, needs the logits again
    again = ctx.return_entropy or not ctx.ahead
    ctx.save_for_backward(live, output[2], *((hidden, *head, targets, temperature) if again else ()))


def _gradient(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    live, slopes, *saved = ctx.saved_tensors
    if not ctx.return_entropy:
        grad_entropy = None
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 12
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(live, dtype=torch.float32)
    if ctx.ahead and grad_entropy is None:
        return (torch.where(live, grad_logprobs, 0.0)[:, None] * slopes).to(ctx.dtype), *(None,) * 11
    hidden, weight, bias, down, up, targets, temperature = saved
    head = LinearHead(weight, bias, down, up, ctx.scale)
    wants = list(ctx.needs_input_grad[:5])
    grads = _backward(
        hidden, *head, targets, live, temperature, ctx.softcap, grad_logprobs,
        grad_entropy, wants,
    )  # fmt: skip
    dtypes = wanted_dtypes(hidden, head, wants)
    return *(None if dtype is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)), *(None,) * 7


_forward = fused_op("linear_logprobs", _kernel, _fake, save=_save, gradient=_gradient)
