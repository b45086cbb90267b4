"""Registers a kernel as a custom op of torch, and calls it directly in eager mode."""

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.kernels.records import Given, is_record

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def fused_op(
    name: str,
    inputs: Any,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates: str | None = None,
    trained: tuple[str, ...] = (),
    save: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
) -> Callable[[Any], Any]:
    """Registers ``kernel`` as the custom op rlhf_fast::name, and returns its caller, which takes an ``inputs``.

    ``inputs`` is a NamedTuple of tensors, numbers and further NamedTuples, whose fields are the op's schema; ``kernel``
    and ``fake``, which gives outputs of the right shape, take one. ``mutates`` names the field that the kernel writes
    to. The autograd formula is ``save(ctx, inputs, output)`` and ``gradient(ctx, *grads)``, which returns the gradients
    of the fields ``trained`` ("hidden", "head.weight"), in their order; ``ctx.needs`` tells which of them are needed.
    An output that was not wanted is None; an op of torch has no such thing, and gives an empty tensor.

    A custom op costs 30 to 80 microseconds of Python a call, many times a small kernel. So plain tensors in eager mode
    reach the kernel straight, through an autograd.Function of the same formula; whatever watches or traces gets the op.
    """
    kind, parameters = inputs, list(_parameters(inputs))
    names = [parameter.name for parameter in parameters]

    def on_flat(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *flat: _without_none(function(_built(inputs, iter(flat))), flat[0])

    flat_kernel = on_flat(kernel)
    returned = inspect.signature(kernel).return_annotation
    outputs = getattr(returned, "_fields", None) or typing.get_args(returned)
    if outputs:
        returned = tuple[(Tensor,) * len(outputs)]  # type: ignore[misc]
    flat_kernel.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    op = torch.library.custom_op(f"rlhf_fast::{name}", mutates_args=(mutates,) if mutates else ())(flat_kernel)
    op.register_fake(on_flat(fake))
    straight = kernel
    if mutates is not None:
        straight = _bumping(kernel, mutates)
    elif gradient is not None and save is not None:
        places = [names.index(path.rpartition(".")[2]) for path in trained]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, _built(kind, iter(inputs)), output)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            ctx.needs = tuple(ctx.needs_input_grad[place] for place in places)
            found = dict(zip(places, gradient(ctx, *grads), strict=True))
            return tuple(found.get(place) for place in range(len(names)))

        op.register_autograd(backward, setup_context=setup_context)
        straight = _differentiable(name, kernel, trained, save, gradient)
    paths = list(_tensor_paths(inputs))
    tensors_of = attrgetter(*paths, paths[0])  # attrgetter returns no tuple for one path

    def call(given: Any) -> Any:
        if torch.compiler.is_compiling() or _watched() or not _PLAIN.issuperset(map(type, tensors_of(given))):
            return op(*_flat(given))
        return straight(given)

    return call


def empty_contiguous(like: Tensor) -> Tensor:
    """Uninitialised, of its shape and dtype; in half the time of new_empty with a shape."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@functools.cache
def _fields(record: Any) -> dict[str, Any]:
    """Name -> type; a tensor that may be absent is Optional to torch."""
    hints = typing.get_type_hints(record, include_extras=True)
    plain = typing.get_type_hints(record)
    return {name: Tensor | None if hint == Given else plain[name] for name, hint in hints.items()}


def _parameters(record: Any) -> Iterator[inspect.Parameter]:
    """The parameters of a function that takes all fields, those of nested records too, one by one."""
    for name, annotation in _fields(record).items():
        if is_record(annotation):
            yield from _parameters(annotation)
        else:
            yield inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _tensor_paths(record: Any, before: str = "") -> Iterator[str]:
    for name, annotation in _fields(record).items():
        if is_record(annotation):
            yield from _tensor_paths(annotation, f"{before}{name}.")
        elif annotation is Tensor or Tensor in typing.get_args(annotation):
            yield before + name


def _flat(record: tuple[Any, ...]) -> list[Any]:
    flat: list[Any] = []
    for value in record:
        if isinstance(value, tuple):
            flat.extend(_flat(value))
        else:
            flat.append(value)
    return flat


def _built(record: Any, flat: Iterator[Any]) -> Any:
    kinds = _fields(record).values()
    return record(*[_built(kind, flat) if is_record(kind) else next(flat) for kind in kinds])


def _without_none(outputs: Any, like: Any) -> Any:
    if not isinstance(outputs, tuple):
        return outputs
    return tuple(like.new_empty(0) if output is None else output for output in outputs)


def _watched() -> bool:
    """Whether a dispatch mode, a functional transform or a tracer is active."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _bumping(kernel: Callable[..., Any], mutates: str) -> Callable[..., Any]:
    """For a kernel that writes to an input: raises its version, so that a backward that saved it raises an error."""

    def call(inputs: Any) -> Any:
        torch.autograd.graph.increment_version(getattr(inputs, mutates))
        return kernel(inputs)

    return call


def not_differentiable(ctx: Any, outputs: Sequence[Tensor | None]) -> None:
    ctx.mark_non_differentiable(*[output for output in outputs if output is not None])


def once_differentiable(refusal: str, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """``grads`` of a backward. Under create_graph=True a second derivative would silently lack their part: it raises
    ``refusal``.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    refuse: Any = torch._C._functions.DelayedError(refusal, len(grads))
    refused = refuse(*(None if grad is None else grad.detach().requires_grad_() for grad in grads))
    return refused if isinstance(refused, tuple) else (refused,)


def _differentiable(
    name: str,
    kernel: Callable[..., Any],
    trained: tuple[str, ...],
    save: Callable[..., None],
    gradient: Callable[..., Any],
) -> Callable[[Any], Any]:
    def forward(ctx: Any, inputs: Any, *_: Tensor | None) -> Any:
        output = kernel(inputs)
        if any(ctx.needs_input_grad):
            save(ctx, inputs, output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.needs = ctx.needs_input_grad[1:]
        with torch.no_grad():
            found = gradient(ctx, *grads)
        return None, *once_differentiable(f"rlhf_fast.{name} has no second derivative", found)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)
    apply = super(torch.autograd.Function, function).apply  # Function.apply itself checks for functorch again
    trained_of = attrgetter(*trained)
    if len(trained) == 1:  # attrgetter returns no tuple for one
        return lambda inputs: apply(inputs, trained_of(inputs))
    return lambda inputs: apply(inputs, *trained_of(inputs))
