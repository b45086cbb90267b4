"""The walk of the ops with an lm head: tiles of float32 logits by matrix products, each folded in place by a kernel.

The live rows go in chunks. A chunk's logits fill one buffer, the fold turns them into their own gradient, and the
products with that gradient follow before the next chunk takes the buffer: with a frozen head, two products in all.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._linear import Head
from ._products import (
    TILE,
    add_product_,
    empty_logits,
    logits_product,
    matmul,
    plan,
    product,
    product_dtype,
    tiles,
)

Fold = Callable[[slice, tuple[Tensor, ...], Tensor | None], None]


# What may need a gradient, in the order of HeadGradients: fields of the ops' inputs.
TRAINED = ("hidden", "head.weight", "head.bias", "head.down", "head.up")


class HeadGradients(NamedTuple):
    """One a tensor of the head; empty where it was not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor


def wanted(hidden: Tensor, head: Head) -> list[bool]:
    """Which of them need one."""
    tensors = (hidden, *head[:4])
    return [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]


def wanted_dtypes(hidden: Tensor, head: Head, wants: list[bool]) -> list[torch.dtype | None]:
    tensors = zip((hidden, *head[:4]), wants, strict=True)
    return [tensor.dtype if want and tensor is not None else None for tensor, want in tensors]


def empty_gradients(hidden: Tensor, head: Head, wants: list[bool]) -> HeadGradients:
    """Uninitialised, (0,) where not wanted. In float32, which the chunks are added up in; but a hidden state belongs to
    one chunk, so that its gradient may be rounded to bfloat16 at once. (In float16 it could vanish.)
    """
    tensors = zip((hidden, *head[:4]), wants, strict=True)
    shapes = [tensor.shape if want and tensor is not None else (0,) for tensor, want in tensors]
    first = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
    dtypes = (first, *(torch.float32,) * (len(shapes) - 1))
    return HeadGradients(*(hidden.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))


def scaled(grad_loss: Tensor, grads: tuple[Tensor, ...], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """The gradients of a loss, from those that its sweep formed, each in its tensor's dtype; None where not wanted."""
    return [None if dtype is None else (grad_loss * grad).to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def sweep(head: Head, hiddens: tuple[Tensor, ...], fold: Fold, wants: list[bool]) -> HeadGradients:
    """Folds the logits of every row of ``hiddens`` (one or two of (live, H)), a chunk at a time.

    ``fold(rows, logits, grad)`` gets a slice of the rows and their float32 logits, one (n, V) for each of ``hiddens``.
    Where gradients are wanted it writes d loss / d logits of the first into ``grad`` (n, V), which may lie over those
    logits, a row over its own; the gradients are those of the first alone.
    """
    hidden, device = hiddens[0], head.weight.device
    rows, vocab = hidden.shape[0], head.weight.shape[0]
    dtype = product_dtype(hidden)
    in_one = head.weight.dtype == dtype and head.bias is None and head.down is None
    cut = plan(rows, vocab, len(hiddens), device, in_one)
    columns = tiles(vocab, cut.columns)
    buffers = [empty_logits(cut, vocab, dtype, device) for _ in hiddens]
    grads = buffers[0][1]
    sums = _Sums(hidden, head, wants, dtype)
    with torch.autocast(device.type, enabled=False):  # which would round the products
        for start in range(0, rows, cut.rows):
            stop = min(start + cut.rows, rows)
            inputs = [states[start:stop].to(dtype) for states in hiddens]
            logits = [buffer[: stop - start] for buffer, _ in buffers]
            for states, out in zip(inputs, logits, strict=True):
                _project(states, head, columns, out)
            for first in range(0, stop - start, cut.fold):
                part = slice(first, min(first + cut.fold, stop - start))
                grad = grads[part] if any(wants) else None
                fold(slice(start + part.start, start + part.stop), tuple(each[part] for each in logits), grad)
            sums.add(slice(start, stop), inputs[0], grads[: stop - start])
    return sums.grads


def _project(hidden: Tensor, head: Head, columns: list[slice], out: Tensor) -> None:
    """The logits (n, V) of hidden (n, H), in float32 whatever the factors are."""
    inner = None
    if head.down is not None:
        inner = matmul(hidden.float(), head.down.float().T).mul_(head.scale)
    tiled = hidden.is_cuda or hidden.dtype == torch.float32  # the engine's own product cuts itself up
    if not tiled:
        logits_product(hidden, head.weight, out)
    for tile in columns:
        logits = out[:, tile]
        if tiled:
            logits_product(hidden, head.weight[tile], logits)
        if inner is not None and head.up is not None:
            add_product_(logits, inner, head.up[tile].float().T, 1.0)
        if head.bias is not None:
            logits.add_(head.bias[tile])


class _Sums:
    """The gradients of the head, added up over the chunks; those of the hidden states as they come."""

    def __init__(self, hidden: Tensor, head: Head, wants: list[bool], dtype: torch.dtype) -> None:
        self.head, self.wants, self.dtype = head, wants, dtype
        self.grads = empty_gradients(hidden, head, wants)
        for total in self.grads[1:]:
            total.zero_()

    def add(self, rows: slice, hidden: Tensor, grad: Tensor) -> None:
        """``grad`` (n, V) is d loss / d logits of hidden (n, H), in the same dtype."""
        if not any(self.wants):
            return
        want_hidden, want_weight, want_bias, want_down, want_up = self.wants
        head, dtype, grads = self.head, self.dtype, self.grads
        inner = None  # d loss / d (hidden down^T)
        if head.up is not None and (want_hidden or want_down):
            inner = product(grad, head.up.to(dtype)).mul_(head.scale).to(dtype)
        if want_hidden:
            grads.hidden[rows] = self._of_hidden(grad, inner)
        if want_weight:
            for tile in tiles(grad.shape[1], TILE):
                if dtype == torch.float32:
                    add_product_(grads.weight[tile], grad[:, tile].T, hidden, 1.0)
                else:
                    grads.weight[tile] += product(grad[:, tile].T, hidden)
        if want_bias:
            grads.bias.add_(product(grad.new_ones(1, grad.shape[0]), grad)[0])
        if want_down and inner is not None:
            grads.down.add_(product(inner.T, hidden))
        if want_up and head.down is not None:
            adapted = product(hidden, head.down.to(dtype).T).to(dtype)
            grads.up.add_(product(grad.T, adapted), alpha=head.scale)

    def _of_hidden(self, grad: Tensor, inner: Tensor | None) -> Tensor:
        weight = self.head.weight
        if weight.dtype == self.dtype:
            total = product(grad, weight)
        else:
            total = grad.new_zeros(grad.shape[0], weight.shape[1])
            for tile in tiles(grad.shape[1], TILE):
                add_product_(total, grad[:, tile], weight[tile].to(self.dtype), 1.0)
        if inner is not None and self.head.down is not None:
            total += product(inner, self.head.down.to(self.dtype))
        return total
