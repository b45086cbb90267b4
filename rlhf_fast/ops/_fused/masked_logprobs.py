"""masked_logprobs on fused kernels: the logits are read once forward, and once backward."""

import functools
from typing import Any

import torch
from torch import Tensor

from .._dispatch import implements
from .._launch import launch
from ._op import fused_op
from ._rows import STATISTICS, logits_arguments, rows_arguments, unit_columns


@implements("masked_logprobs", "native", "triton", "cuda")
def fused(
    logits: Tensor,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float | None,
    vocab_size: int,
    return_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor | None]:
    # Under torch.compile the gradient's memory is the compiler's business, and a graph must not write to its inputs.
    inplace = inplace_backward and not torch.compiler.is_compiling()
    logprobs, entropy, _ = _forward(
        unit_columns(logits), targets, live, temperature, softcap or 0.0, vocab_size, return_entropy, inplace
    )
    return logprobs, entropy if return_entropy else None


def _kernel(
    logits: Tensor,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    return_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> logprobs (N,), entropy (N,) or (0,), statistics (N, 4)."""
    logprobs, entropy, statistics = _outputs(logits, return_entropy)
    launch(
        "masked_logprobs",
        *rows_arguments(logits.shape[0], vocab_size, targets, live, temperature, softcap),
        *logits_arguments(logits),
        logprobs,
        entropy if return_entropy else None,
        statistics,
    )
    return logprobs, entropy, statistics


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(logits, rest[-2])


def _outputs(logits: Tensor, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    empty = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    return empty(rows), empty(rows if return_entropy else 0), empty(rows, STATISTICS)


def _backward_kernel(
    grad: Tensor,
    logits: Tensor | None,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    statistics: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Writes the gradient into grad (N, V), which holds the logits itself where ``logits`` is None."""
    launch(
        "masked_logprobs_backward",
        *rows_arguments(grad.shape[0], vocab_size, targets, live, temperature, softcap),
        *logits_arguments(grad if logits is None else logits),
        grad.shape[1],
        statistics,
        logprobs,
        entropy,
        None if grad_logprobs is None else grad_logprobs.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        grad,
        grad.stride(0),
    )


_backward = fused_op("masked_logprobs_backward", _backward_kernel, lambda *arguments: None, mutates=("grad",))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, live, temperature, ctx.softcap, ctx.vocab_size, ctx.return_entropy, ctx.inplace_backward = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.spent = False
    ctx.save_for_backward(logits, targets, live, temperature, *output)


def _gradient(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if ctx.spent:
        raise RuntimeError(
            "masked_logprobs: inplace_backward=True wrote the gradient over the logits in the first backward, so "
            "there can be no second one; pass inplace_backward=False to run the backward twice"
        )
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 8
    logits, targets, live, temperature, logprobs, entropy, statistics = ctx.saved_tensors
    ctx.spent = ctx.inplace_backward
    # Detached, it shares memory and version counter: whoever else kept the logits is told that they changed.
    grad = logits.detach() if ctx.inplace_backward else torch.empty_like(logits, memory_format=torch.contiguous_format)
    _backward(
        grad,
        None if ctx.inplace_backward else logits,
        targets,
        live,
        temperature,
        ctx.softcap,
        ctx.vocab_size,
        statistics,
        logprobs,
        entropy if ctx.return_entropy else None,
        grad_logprobs,
        grad_entropy if ctx.return_entropy else None,
    )
    return grad, *(None,) * 7


_forward = fused_op("masked_logprobs", _kernel, _fake, save=_save, gradient=_gradient)
