"""How a kernel becomes an op of torch, and how it is reached."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fused_op(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates: tuple[str, ...] = (),
    save: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers ``kernel`` (whose annotations are the schema) as the custom op rlhf_fast::name, and returns its caller.

    ``mutates`` names the first argument where the kernel writes to it; ``fake`` gives outputs of the right shape;
    ``save(ctx, inputs, output)`` and ``gradient(ctx, *grads)`` are the autograd formula, in the form of
    ``torch.library.register_autograd``.

    A custom op costs 30 to 80 microseconds of Python a call, many times a small kernel. So plain tensors in eager mode
    reach the kernel straight, through an autograd.Function of the same formula; whatever traces gets the op.
    """
    op = torch.library.custom_op(f"rlhf_fast::{name}", mutates_args=mutates, device_types="cpu")(kernel)
    op.register_fake(fake)
    straight = _bumping(kernel) if mutates else kernel
    if gradient is not None and save is not None:
        op.register_autograd(gradient, setup_context=save)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = kernel(*inputs)
            save(ctx, inputs, output)
            return output

        backward = torch.autograd.function.once_differentiable(gradient)
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        straight = getattr(type(name, (torch.autograd.Function,), members), "apply")  # noqa: B009 (mypy sees a type)

    def call(first: Tensor, *arguments: Any) -> Any:
        traced = torch.compiler.is_compiling() or type(first) not in (Tensor, torch.nn.Parameter)
        return (op if traced else straight)(first, *arguments)

    return call


def _bumping(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Of a kernel that writes to its first argument: whoever saved that tensor for a backward is told."""

    def call(first: Tensor, *arguments: Any) -> Any:
        torch.autograd.graph.increment_version(first)
        return kernel(first, *arguments)

    return call
