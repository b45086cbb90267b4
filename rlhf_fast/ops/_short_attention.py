"""Attention over short packed sequences, on the compiled engine."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from ._dispatch import forced_backend
from ._op import fused_op
from ._rows import dtype_code

LANES = 16  # of the widest vector, to which the engine fills up the keys


class Inputs(NamedTuple):
    query: Tensor  # (heads, N, D), float32, bfloat16 or float16
    key: Tensor  # (shared heads, N, D)
    value: Tensor  # (shared heads, N, E)
    mask: Tensor  # (T, T) bool between two positions of a sequence, contiguous: True = attends; one at least in a row
    starts: Tensor  # (S + 1,) int64 on the CPU: the first token of each of S sequences of at most T tokens, and N
    scale: float


def can_attend(query: Tensor) -> bool:
    """Whether the engine can compute ``short_attention`` of it, and no torch backend is forced."""
    if query.device.type != "cpu" or query.dtype == torch.float64 or forced_backend() == "torch":
        return False
    return _native.native.reason is None


def short_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, starts: Tensor, scale: float) -> Tensor:
    """softmax(scale query key^T) value of each sequence, (N, heads, E), of what ``Inputs`` describes. Differentiable in
    query, key and value.

    Sums are in float32, rounded once. The scores are computed again in the backward, not kept.
    """
    return _forward(Inputs(query, key, value, mask, starts, scale))[0]


def _kernel(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> out, and the log-sum-exp of the scores (N, heads) float32."""
    out, log_sums = _outputs(inputs)
    _launch(inputs, out, log_sums, [None] * 4)
    return out, log_sums


def _outputs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    heads, tokens, _ = inputs.query.shape
    out = inputs.query.new_empty(tokens, heads, inputs.value.shape[2])
    return out, inputs.query.new_empty(tokens, heads, dtype=torch.float32)


class _Backward(NamedTuple):
    grad_out: Tensor  # (N, heads, E)
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    starts: Tensor
    log_sums: Tensor
    scale: float


def _backward_kernel(given: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    grads = _gradients(given)
    inputs = Inputs(given.query, given.key, given.value, given.mask, given.starts, given.scale)
    _launch(inputs, None, given.log_sums, [given.grad_out.transpose(0, 1), *grads])
    return grads


def _gradients(given: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out as the projections' outputs, (N, heads, D)."""

    def like(rows: Tensor) -> Tensor:
        return rows.new_empty(rows.shape[1], rows.shape[0], rows.shape[2]).transpose(0, 1)

    return like(given.query), like(given.key), like(given.value)


def _launch(inputs: Inputs, out: Tensor | None, log_sums: Tensor, grads: list[Tensor | None]) -> None:
    heads, _, width = inputs.query.shape
    shared, _, value_width = inputs.value.shape
    longest, threads = inputs.mask.shape[0], torch.get_num_threads()
    rows, keys = heads // shared * longest, longest + LANES
    scratch_size = 3 * (rows + keys) * max(width, value_width) + 2 * rows * keys
    scratch = torch.empty(threads, scratch_size)
    inputs_and_out = [inputs.query, inputs.key, inputs.value, None if out is None else out.transpose(0, 1)]
    _native.short_attention(
        dtype_code(inputs.query),
        [len(inputs.starts) - 1, heads, shared, width, value_width, longest],
        inputs.starts,
        inputs.mask,
        inputs.scale,
        inputs_and_out,
        log_sums,
        grads,
        scratch,
    )


def _save(ctx: Any, inputs: Inputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.scale = inputs.scale


def _gradient(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mask, starts, log_sums = ctx.saved_tensors
    grads = _backward(_Backward(_unit(grad_out), query, key, value, mask, starts, log_sums, ctx.scale))
    return tuple(grad if need else None for grad, need in zip(grads, ctx.needs, strict=True))


def _unit(rows: Tensor) -> Tensor:
    return rows if rows.stride(2) == 1 else rows.contiguous()


_backward = fused_op("short_attention_backward", _Backward, _backward_kernel, _gradients)
_forward = fused_op(
    "short_attention", Inputs, _kernel, _outputs, trained=("query", "key", "value"), save=_save, gradient=_gradient
)
