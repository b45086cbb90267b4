"""Shared by the ops with an lm head: checks of the head, autocast, and the torch reference's loop over live tokens.

The reference projects only live tokens, chunk by chunk, and never stores all logits at once. Its backward recomputes
the logits of each chunk.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import _checks
from ._op import once_differentiable
from ._rows import Tokens, accumulation_dtype, vocabulary

# Elements of one chunk of logits: 128 MiB in fp32.
CHUNK_ELEMENTS = 1 << 25

LoRA = tuple[Tensor, Tensor, float]


class Head(NamedTuple):
    """logits = hidden weight^T + scale * (hidden down^T) up^T + bias."""

    weight: Tensor  # (V, H); inside autocast in its own dtype, and rounded to that of hidden where it is multiplied
    bias: Tensor | None = None  # (V,)
    down: Tensor | None = None  # A of an adapter, (r, H)
    up: Tensor | None = None  # B, (V, r)
    scale: float = 0.0


def without_adapter(head: Head) -> Head:
    return Head(head.weight, head.bias)


class Inputs(NamedTuple):
    """The checked inputs of the ops with one hidden state per token."""

    hidden: Tensor  # (N, H)
    head: Head
    tokens: Tokens
    softcap: float  # 0 = none


def checked_head(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None, vocab_size: int | None
) -> tuple[Tensor, Head]:
    """Checks hidden (..., H) and the head. Returns hidden as autocast casts it, and the head cut to vocab_size rows."""
    _checks.floating(op, hidden=hidden, weight=weight)
    if hidden.dim() < 1:
        raise ValueError(f"{op}: hidden must have shape (..., H); got a tensor without dimensions")
    features = hidden.shape[-1]
    if features < 1:
        raise ValueError(f"{op}: hidden must have at least one feature; got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != features:
        raise ValueError(
            f"{op}: weight must have shape (V, {features}) (H as in hidden {tuple(hidden.shape)}); "
            f"got {tuple(weight.shape)}"
        )
    _checks.same_device(op, hidden=hidden, weight=weight)
    given, hidden = hidden.dtype, autocasted(hidden)
    if _dtype_in_autocast(weight) != hidden.dtype:
        raise TypeError(
            f"{op}: weight must be {given} like hidden; got {weight.dtype}; cast one of the two (inside torch.autocast "
            "both are cast, but for float64)"
        )
    columns = weight.shape[0]
    vocab = vocabulary(op, columns, vocab_size)
    if bias is not None:
        _checks.floating(op, bias=bias)
        _checks.shaped(op, (columns,), "one entry a row of weight", bias=bias)
        _checks.same_device(op, hidden=hidden, bias=bias)
    down, up, scale = (None, None, 0.0) if lora is None else checked_lora(op, hidden, columns, lora)
    if vocab < columns:
        weight = weight[:vocab]
        bias, up = (None if part is None else part[:vocab] for part in (bias, up))
    return hidden, Head(weight, bias, down, up, scale)


def autocasted(operand: Tensor) -> Tensor:
    """Casts an operand as F.linear does: to the dtype of the surrounding torch.autocast, if any; float64 stays.

    Differentiable: the gradient has the operand's own dtype.
    """
    return operand.to(_dtype_in_autocast(operand))


def _dtype_in_autocast(operand: Tensor) -> torch.dtype:
    if not _inside_autocast(operand) or operand.dtype == torch.float64:
        return operand.dtype
    return torch.get_autocast_dtype(operand.device.type)


def _inside_autocast(tensor: Tensor) -> bool:
    if tensor.is_cpu:  # the CPU always has autocast; skipping the other call halves the time
        return torch.is_autocast_enabled("cpu")
    device = tensor.device.type  # "meta" has no autocast
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class _Rounded(torch.autograd.Function):
    """weight rounded to a dtype. Its gradient is not rounded to it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, to: torch.dtype, kept_in: torch.dtype) -> Tensor:
        return weight.to(to).to(kept_in)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype, torch.dtype], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].to(ctx.dtype), None, None


def in_full_precision(head: Head, hidden: Tensor) -> Head:
    """The head with its trained parts in the accumulation dtype, so that the chunks' gradients are summed in it and
    rounded once.

    A frozen weight stays in the dtype of hidden: the backward would keep the copy.
    """
    dtype = accumulation_dtype(hidden.dtype)
    trained = head.weight.requires_grad
    weight: Tensor = _Rounded.apply(head.weight, hidden.dtype, dtype if trained else hidden.dtype)
    bias, down, up = (None if part is None else part.to(dtype) for part in head[1:4])
    return Head(weight, bias, down, up, head.scale)


def project(hidden: Tensor, head: Head, softcap: float | None) -> Tensor:
    """Softcapped logits (n, V) of hidden (n, H), computed in the accumulation dtype."""
    dtype = accumulation_dtype(hidden.dtype)
    if torch.is_grad_enabled() and not _checks.under_torch_func() and not torch.compiler.is_compiling():
        hidden, head = _differentiable_once(hidden, head)
    hidden = hidden.to(dtype)
    logits = Product.apply(hidden, head.weight.to(dtype))
    if head.down is not None:
        logits = logits + head.scale * Product.apply(Product.apply(hidden, head.down), head.up)
    if head.bias is not None:
        logits = logits + head.bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _differentiable_once(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    hidden, weight, bias, down, up = _Once.apply(hidden, *head[:4])
    return hidden, Head(weight, bias, down, up, head.scale)


class _Once(torch.autograd.Function):
    """The identity. Refuses a second derivative, which would lack the part of the checkpointed chunks."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        outputs = tuple(None if tensor is None else tensor.view_as(tensor) for tensor in inputs)
        frozen = [
            out for out, wanted in zip(outputs, ctx.needs_input_grad, strict=True) if out is not None and not wanted
        ]
        ctx.mark_non_differentiable(*frozen)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return once_differentiable("the operations with a head have no second derivative", grads)


class Product(torch.autograd.Function):
    """left (n, k) x right (m, k)^T, with autocast disabled in the forward and in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        with without_autocast(left):
            return left @ right.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        wants_left, wants_right = ctx.needs_input_grad
        with without_autocast(left):
            return grads[0] @ right if wants_left else None, grads[0].T @ left if wants_right else None


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    if not _inside_autocast(tensor):
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def over_live_rows(
    function: Callable[..., tuple[Tensor, ...]], live: Tensor, head: Head, hidden: Tensor, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Runs ``function`` on chunks of the live rows of hidden (N, H) and ``tensors`` (N, ...), and joins its results.

    The results are (n, ...) of each chunk, and (N, ...) joined, 0 in the dead rows, which are never read. Gathering the
    live rows synchronises on a GPU.
    """
    inputs = (hidden, *tensors)
    # Where the number of live rows is unknown, as in a compiled graph, all rows are computed, the dead ones on harmless
    # values.
    rows = live.nonzero().squeeze(1) if _checks.has_values(live) else None
    inputs = tuple(_inert(tensor, live) if rows is None else tensor.index_select(0, rows) for tensor in inputs)
    step = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
    chunks = zip(*(tensor.split(step) for tensor in inputs), strict=True)
    trained = (hidden, *head[:4])
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in trained)
    if recorded and not _checks.under_torch_func():  # torch.func does not support checkpoint
        parts = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    else:
        parts = [function(*chunk) for chunk in chunks]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    if rows is None:
        return tuple(column.masked_fill(~live.view(-1, *(1,) * (column.dim() - 1)), 0.0) for column in columns)
    return tuple(column.new_zeros(live.shape[0], *column.shape[1:]).index_copy(0, rows, column) for column in columns)


def _inert(tensor: Tensor, live: Tensor) -> Tensor:
    """(N, ...) with harmless values in the dead rows: 0 for a target, 1 for a hidden state or a temperature."""
    dead = ~live if tensor.dim() == 1 else ~live[:, None]
    return tensor.masked_fill(dead, float(tensor.is_floating_point()))


def checked_lora(op: str, hidden: Tensor, columns: int, lora: LoRA) -> LoRA:
    """Checks an adapter on a layer from hidden (..., H) to ``columns`` outputs."""
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise TypeError(f"{op}: lora must be a tuple (A, B, scale); got {type(lora).__name__}")
    down, up, scale = lora
    _checks.floating(op, **{"lora A": down, "lora B": up})
    if down.dim() != 2:
        raise ValueError(f"{op}: lora A must have shape (r, {hidden.shape[-1]}); got {tuple(down.shape)}")
    rank = down.shape[0]
    _checks.shaped(op, (rank, hidden.shape[-1]), "(r, H)", **{"lora A": down})
    _checks.shaped(op, (columns, rank), "(V, r)", **{"lora B": up})
    _checks.same_device(op, hidden=hidden, **{"lora A": down, "lora B": up})
    if not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: lora scale must be a number; got {type(scale).__name__}")
    return down, up, float(scale)
