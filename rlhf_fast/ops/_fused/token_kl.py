"""token_kl on fused kernels: one sweep forward, one backward."""

from typing import Any

import torch
from torch import Tensor

from .._dispatch import implements
from .._launch import launch
from ._op import fused_op

_CODES = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}  # Kl of csrc/rlhf_fast.h


def kl_codes(estimator: str) -> tuple[int, int]:
    """Whose value an estimator has, and whose slope: a "+" form has k2's."""
    value = _CODES[estimator.removesuffix("+")]
    return value, _CODES["k2"] if estimator.endswith("+") else value


@implements("token_kl", "native", "triton", "cuda")
def fused(logprobs: Tensor, ref_logprobs: Tensor, live: Tensor | None, estimator: str) -> Tensor:
    return _forward(logprobs, ref_logprobs, live, *kl_codes(estimator))


def _kernel(logprobs: Tensor, ref_logprobs: Tensor, live: Tensor | None, value: int, slope: int) -> Tensor:
    kl = logprobs.new_empty(logprobs.shape)
    launch("token_kl", *_arguments(logprobs, ref_logprobs, live), value, kl, torch.get_num_threads())
    return kl


def _backward_kernel(
    grad_kl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, live: Tensor | None, slope: int
) -> Tensor:
    grad = logprobs.new_empty(logprobs.shape)
    arguments = _arguments(logprobs, ref_logprobs, live)
    launch("token_kl_backward", *arguments, slope, grad_kl.contiguous(), grad, torch.get_num_threads())
    return grad


def _arguments(logprobs: Tensor, ref_logprobs: Tensor, live: Tensor | None) -> tuple[object, ...]:
    """The launchers' leading arguments."""
    live = None if live is None else live.contiguous()
    return logprobs.numel(), logprobs.contiguous(), ref_logprobs.contiguous(), live


def _fake(first: Tensor, *_: object) -> Tensor:
    return first.new_empty(first.shape)


_backward = fused_op("token_kl_backward", _backward_kernel, _fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logprobs, ref_logprobs, live, _, ctx.slope = inputs
    ctx.save_for_backward(logprobs, ref_logprobs, live)


def _gradient(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad_kl, *ctx.saved_tensors, ctx.slope), *(None,) * 4


_forward = fused_op("token_kl", _kernel, _fake, save=_save, gradient=_gradient)
