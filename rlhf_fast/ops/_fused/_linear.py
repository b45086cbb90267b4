"""The walk of the ops with an lm head: tiles of float32 logits by matrix products, each folded in place by a kernel.

The live rows go in chunks. A chunk's logits fill one buffer, the fold turns them into their own gradient, and the
products with that gradient follow before the next chunk takes the buffer: with a frozen head, two products in all.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._launch import launch
from .._native import dtype_code, multiplies_bfloat16

# The buffer of one chunk's logits. Fewer rows a chunk would read the weight more often than it takes to multiply them.
CHUNK_BYTES = 48 << 20
# Rows of the buffer begin an odd number of cache lines apart: a power of two between them, of which vocabularies are
# often a multiple, has them fight for the same places in the cache.
LINE = 16
# Columns of one product. Tiles that stay in the cache are a tenth faster in float32 than the whole width at once, and
# what is added to the logits (bias, adapter) finds them there.
TILE = 2048

Fold = Callable[[slice, tuple[Tensor, ...], int], None]


class LinearHead(NamedTuple):
    """logits = hidden weight^T + scale * (hidden down^T) up^T + bias, as the custom ops take it."""

    weight: Tensor  # (V, H)
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    scale: float


class HeadGradients(NamedTuple):
    """One a tensor of the head; empty where it was not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor


def flat_head(weight: Tensor, bias: Tensor | None, lora: tuple[Tensor, Tensor, float] | None) -> LinearHead:
    return LinearHead(weight, bias, *(lora if lora is not None else (None, None, 0.0)))


def trainable(hidden: Tensor, head: LinearHead) -> tuple[Tensor | None, ...]:
    """What may need a gradient, in the order of HeadGradients."""
    return hidden, head.weight, head.bias, head.down, head.up


def wanted(hidden: Tensor, head: LinearHead) -> list[bool]:
    """Which of them need one."""
    tensors = trainable(hidden, head)
    return [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]


def wanted_dtypes(hidden: Tensor, head: LinearHead, wants: list[bool]) -> list[torch.dtype | None]:
    tensors = zip(trainable(hidden, head), wants, strict=True)
    return [tensor.dtype if want and tensor is not None else None for tensor, want in tensors]


def empty_gradients(hidden: Tensor, head: LinearHead, wants: list[bool]) -> HeadGradients:
    """Uninitialised, in float32, which the chunks are added up in. (0,) where not wanted."""
    tensors = zip(trainable(hidden, head), wants, strict=True)
    shapes = [tensor.shape if want and tensor is not None else (0,) for tensor, want in tensors]
    return HeadGradients(*(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes))


def scaled(grad_loss: Tensor, grads: tuple[Tensor, ...], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """The gradients of a loss, from those that its sweep formed, each in its tensor's dtype; None where not wanted."""
    return [None if dtype is None else (grad_loss * grad).to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


class LiveRows:
    """The live ones of N rows: taken out side by side, and put back among zeros."""

    def __init__(self, live: Tensor) -> None:
        self.rows = live.shape[0]
        self.index = None if bool(live.all()) else live.nonzero().squeeze(1)
        self.count = self.rows if self.index is None else self.index.shape[0]

    def take(self, tensor: Tensor) -> Tensor:
        """(N, ...) -> (live, ...), contiguous."""
        return tensor.contiguous() if self.index is None else tensor.index_select(0, self.index)

    def put(self, tensor: Tensor) -> Tensor:
        """(live, ...) -> (N, ...), 0 elsewhere."""
        if self.index is None:
            return tensor
        return tensor.new_zeros(self.rows, *tensor.shape[1:]).index_copy_(0, self.index, tensor)


def sweep(head: LinearHead, hiddens: tuple[Tensor, ...], fold: Fold, wants: list[bool]) -> HeadGradients:
    """Folds the logits of every row of ``hiddens`` (one or two of (live, H)), a chunk at a time.

    ``fold(rows, logits, dtype)`` gets a slice of the rows and their float32 logits, one (n, V) for each of ``hiddens``.
    Where gradients are wanted it leaves d loss / d logits over the first, in the dtype of that code, a row where its
    logits were; the gradients are those of the first alone.
    """
    hidden = hiddens[0]
    vocab = head.weight.shape[0]
    dtype = _product_dtype(hidden.dtype)
    most = max(1, CHUNK_BYTES // (4 * vocab))
    chunks = max(1, math.ceil(hidden.shape[0] / most))
    size = max(1, math.ceil(hidden.shape[0] / chunks))
    width = LINE * (math.ceil(vocab / LINE) | 1)
    buffers = [hidden.new_empty(size, width, dtype=torch.float32)[:, :vocab] for _ in hiddens]
    sums = _Sums(hidden, head, wants, dtype)
    with torch.autocast(hidden.device.type, enabled=False):  # which would round the products
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, min(start + size, hidden.shape[0]))
            inputs = [states[rows].to(dtype) for states in hiddens]
            logits = tuple(buffer[: rows.stop - start] for buffer in buffers)
            for states, out in zip(inputs, logits, strict=True):
                _project(states, head, out)
            fold(rows, logits, dtype_code(dtype))
            sums.add(rows, inputs[0], logits[0].view(dtype)[:, :vocab])
    return sums.grads


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Without half-precision instructions, products in float32 are faster, and more exact."""
    return dtype if dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32


def _tiles(vocab: int) -> list[slice]:
    """The last one takes a rest of up to half a tile: MKL's thin products depend on the number of threads."""
    starts = range(0, max(vocab - TILE // 2, 1), TILE)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], vocab], strict=True)]


def _project(hidden: Tensor, head: LinearHead, out: Tensor) -> None:
    """The logits (n, V) of hidden (n, H), in float32 whatever the factors are."""
    inner = None
    if head.down is not None:
        inner = (hidden.float() @ head.down.float().T).mul_(head.scale)
    if hidden.dtype == torch.bfloat16:
        _bfloat16_product(hidden, head.weight, out)
    for tile in _tiles(out.shape[1]):
        logits = out[:, tile]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, head.weight[tile].float().T, out=logits)
        if inner is not None and head.up is not None:
            logits.addmm_(inner, head.up[tile].float().T)
        if head.bias is not None:
            logits.add_(head.bias[tile])


def _bfloat16_product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    launch(
        "bfloat16_product", *out.shape, hidden.shape[1], hidden, hidden.stride(0), weight, weight.stride(0), out,
        out.stride(0), torch.get_num_threads(),
    )  # fmt: skip


class _Sums:
    """The gradients of the head, added up over the chunks; those of the hidden states as they come."""

    def __init__(self, hidden: Tensor, head: LinearHead, wants: list[bool], dtype: torch.dtype) -> None:
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
            inner = (grad @ head.up.to(dtype)).mul_(head.scale)
        if want_hidden:
            self._add_hidden(rows, grad, inner)
        if want_weight:
            for tile in _tiles(grad.shape[1]):
                if dtype == torch.float32:
                    grads.weight[tile].addmm_(grad[:, tile].T, hidden)
                else:
                    grads.weight[tile] += grad[:, tile].T @ hidden
        if want_bias:
            grads.bias.add_((grad.new_ones(1, grad.shape[0]) @ grad)[0])
        if want_down and inner is not None:
            grads.down.add_(inner.T @ hidden)
        if want_up and head.down is not None:
            grads.up.add_(grad.T @ (hidden @ head.down.to(dtype).T), alpha=head.scale)

    def _add_hidden(self, rows: slice, grad: Tensor, inner: Tensor | None) -> None:
        out = self.grads.hidden[rows]
        weight = self.head.weight
        if weight.dtype == torch.float32:
            torch.mm(grad, weight, out=out)
        elif weight.dtype == self.dtype:
            out.copy_(grad @ weight)
        else:
            out.zero_()
            for tile in _tiles(grad.shape[1]):
                out.addmm_(grad[:, tile], weight[tile].to(self.dtype))
        if inner is not None and self.head.down is not None:
            out.add_(inner @ self.head.down.to(self.dtype))
