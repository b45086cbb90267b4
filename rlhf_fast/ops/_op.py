"""Registers a kernel as a torch custom op, and bypasses torch's dispatcher in eager mode."""

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
    constants: int = 0,
    save: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
) -> Callable[[Any], Any]:
    """Registers ``kernel`` as the custom op rlhf_fast::name. Returns a function that runs it on one ``inputs`` record.

    Calling a custom op takes 30 to 80 microseconds of Python, many times as long as a small kernel. So in eager mode,
    with plain tensors, the returned function calls the kernel directly, through an autograd.Function with the same
    gradient. It calls the op under torch.compile, a tracer, a dispatch mode or torch.func, or with tensor subclasses.

    Args:
        inputs: a NamedTuple class of tensors, numbers and further NamedTuples. Its fields, flattened, are the schema.
        kernel: takes an ``inputs``, returns the outputs. An output that is not wanted is None; the op itself returns an
            empty tensor for it, because torch's ops cannot return None.
        fake: takes an ``inputs``, returns outputs of the right shape and dtype.
        mutates: the field that the kernel writes to.
        trained: the fields that may get a gradient ("hidden", "head.weight").
        constants: the last so many outputs have no gradient. In eager mode they bypass autograd, which takes a
            microsecond for each output; ``gradient`` may then get no gradients for them.
        save: ``save(ctx, inputs, output)`` keeps what ``gradient`` needs.
        gradient: ``gradient(ctx, *grads)`` returns the gradients of ``trained``, in that order; ``ctx.needs`` has a
            bool for each of them.
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
            if constants:
                ctx.mark_non_differentiable(*output[-constants:])
            save(ctx, _built(kind, iter(inputs)), output)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            ctx.needs = tuple(ctx.needs_input_grad[place] for place in places)
            found = dict(zip(places, gradient(ctx, *grads), strict=True))
            return tuple(found.get(place) for place in range(len(names)))

        op.register_autograd(backward, setup_context=setup_context)
        straight = _differentiable(name, kernel, trained, constants, save, gradient)
    paths = list(_tensor_paths(inputs))
    tensors_of = attrgetter(*paths, paths[0])  # attrgetter returns no tuple for one path

    def call(given: Any) -> Any:
        if torch.compiler.is_compiling() or _watched() or not _PLAIN.issuperset(map(type, tensors_of(given))):
            return op(*_flat(given))
        return straight(given)

    return call


def empty_contiguous(like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor like this one. Takes half the time of new_empty with a shape."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@functools.cache
def _fields(record: Any) -> dict[str, Any]:
    """Field name -> type; for torch's schema, a tensor that may be absent is Optional."""
    hints = typing.get_type_hints(record, include_extras=True)
    plain = typing.get_type_hints(record)
    return {name: Tensor | None if hint == Given else plain[name] for name, hint in hints.items()}


def _parameters(record: Any) -> Iterator[inspect.Parameter]:
    """The flattened fields of a record, nested records included, as the parameters of a function."""
    for name, annotation in _fields(record).items():
        if is_record(annotation):
            yield from _parameters(annotation)
        else:
            yield inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _tensor_paths(record: Any, before: str = "") -> Iterator[str]:
    for name, annotation in _fields(record).items():
        if is_record(annotation):
            yield from _tensor_paths(annotation, f"{before}{name}.")
        elif annotation is Tensor or annotation == Tensor | None:  # those of a list are of the same kind as the others
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
    """For a kernel that writes to an input: increments the tensor's version, so that autograd reports a stale save."""

    def call(inputs: Any) -> Any:
        torch.autograd.graph.increment_version(getattr(inputs, mutates))
        return kernel(inputs)

    return call


def graph_is_kept() -> bool:
    """In a backward: whether its graph is kept (retain_graph), so that what it saved may be needed again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def not_differentiable(ctx: Any, outputs: Sequence[Tensor | None]) -> None:
    ctx.mark_non_differentiable(*[output for output in outputs if output is not None])


def once_differentiable(refusal: str, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Returns ``grads`` of a backward; under create_graph=True, such that differentiating them raises ``refusal``.

    Otherwise a second derivative would silently lack this op's part.
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
    constants: int,
    save: Callable[..., None],
    gradient: Callable[..., Any],
) -> Callable[[Any], Any]:
    def forward(ctx: Any, inputs: Any, rest: list[Tensor], *_: Tensor | None) -> Any:
        output = kernel(inputs)
        if any(ctx.needs_input_grad):
            save(ctx, inputs, output)
        if constants:
            rest.extend(output[-constants:])
            return output[:-constants]
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.needs = ctx.needs_input_grad[2:]
        with torch.no_grad():
            found = gradient(ctx, *grads)
        return None, None, *once_differentiable(f"rlhf_fast.{name} has no second derivative", found)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)
    apply = super(torch.autograd.Function, function).apply  # Function.apply itself checks for functorch again
    trained_of = attrgetter(*trained, trained[0])  # attrgetter returns no tuple for one path

    def call(inputs: Any) -> Any:
        rest: list[Tensor] = []
        output = apply(inputs, rest, *trained_of(inputs)[:-1])
        return (*output, *rest) if constants else output

    return call
