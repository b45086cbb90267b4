"""How a kernel becomes an op of torch, and how it is reached."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# isinstance(number, Tensor) takes ten times as long as a look into this set
_PLAIN = {Tensor, torch.nn.Parameter, type(None), int, float, bool, str, list}


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
    reach the kernel straight, through an autograd.Function of the same formula; whatever watches or traces gets the op.
    """
    op = torch.library.custom_op(f"rlhf_fast::{name}", mutates_args=mutates)(kernel)
    op.register_fake(fake)
    straight = _bumping(kernel) if mutates else kernel
    if gradient is not None and save is not None:
        op.register_autograd(gradient, setup_context=save)
        straight = _differentiable(name, kernel, save, gradient)

    def call(*arguments: Any) -> Any:
        return (straight if _plain(arguments) else op)(*arguments)

    return call


def _plain(arguments: tuple[Any, ...]) -> bool:
    """Whether the tensors are plain memory, which nothing wraps and nobody watches."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for argument in arguments:
        if type(argument) not in _PLAIN and isinstance(argument, Tensor):
            return False
    return True


def _bumping(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Of a kernel that writes to its first argument: whoever saved that tensor for a backward is told."""

    def call(first: Tensor, *arguments: Any) -> Any:
        torch.autograd.graph.increment_version(first)
        return kernel(first, *arguments)

    return call


def _differentiable(
    name: str, kernel: Callable[..., Any], save: Callable[..., None], gradient: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = kernel(*inputs)
        if any(ctx.needs_input_grad):
            save(ctx, inputs, output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            found = gradient(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        # create_graph=True: a second derivative would silently lack this op's part
        refuse: Any = torch._C._functions.DelayedError(f"rlhf_fast.{name} has no second derivative", len(found))
        return refuse(*(None if grad is None else grad.detach().requires_grad_() for grad in found))

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)
    return super(torch.autograd.Function, function).apply  # its own looks for functorch once more
