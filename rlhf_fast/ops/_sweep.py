"""The loop of the ops with an lm head: chunks of rows from hidden states to results and gradients.

The live rows are gathered first. Then, for each chunk of them:

1. Project: matrix products write the chunk's float32 logits into one buffer.
2. Fold: a kernel reduces each row of logits to its results and overwrites it in place with its gradient.
3. Accumulate: products with that gradient give the gradients of hidden states and head. With a trained head on a GPU
   this is done once for a group of several chunks, whose gradients lie in the buffer together.

The next chunk uses the same buffer. With a frozen head this takes two matrix products in all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from ._linear import Head, without_adapter, without_autocast
from ._products import (
    TILE,
    add_over_rows_,
    add_product_,
    chunks,
    empty_logits,
    logits_product,
    matmul,
    plan,
    product,
    product_dtype,
    tiles,
)
from ._rows import Tokens, rows_of

Fold = Callable[[slice, tuple[Tensor, ...], Tensor | None], None]


class LiveRows:
    """Gathers the live rows out of N, and scatters results back to N rows, 0 in the dead ones.

    On a GPU, counting the live rows synchronises. That is worth it: often half the rows of a padded batch are dead, and
    each would cost its matrix products. While a CUDA graph is captured nothing may synchronise. Then all rows are
    taken, with zeros in the dead ones, and the kernels skip those.
    """

    def __init__(self, tokens: Tokens, softcap: float) -> None:
        self.rows = tokens.targets.shape[0]
        self.index: Tensor | None = None
        self.live = tokens.live
        if self.live is not None and not _capturing(self.live):
            index = self.live.nonzero().squeeze(1)
            self.index = index if index.shape[0] < self.rows else None
            self.live = None
        self.count = self.rows if self.index is None else self.index.shape[0]
        self.targets = self.take(tokens.targets)
        self.temperatures = None if tokens.temperatures is None else self.take(tokens.temperatures)
        self.temperature, self.softcap = tokens.temperature, softcap

    def take(self, tensor: Tensor) -> Tensor:
        """(N, ...) -> (count, ...), contiguous."""
        if self.live is not None:
            return tensor.masked_fill(~self.live.reshape(-1, *(1,) * (tensor.dim() - 1)), 0).contiguous()
        return tensor.contiguous() if self.index is None else tensor.index_select(0, self.index)

    @overload
    def put(self, tensor: Tensor) -> Tensor: ...
    @overload
    def put(self, tensor: None) -> None: ...
    @overload
    def put(self, tensor: Tensor | None) -> Tensor | None: ...
    def put(self, tensor: Tensor | None) -> Tensor | None:
        """(count, ...) -> (N, ...), 0 elsewhere; None stays None."""
        if self.index is None or tensor is None:
            return tensor
        return tensor.new_zeros(self.rows, *tensor.shape[1:]).index_copy_(0, self.index, tensor)

    def part(self, part: slice, logits: Tensor) -> records.Rows:
        """The record of the rows ``part``, whose logits (n, V) are given."""
        live, temperatures = (None if each is None else each[part] for each in (self.live, self.temperatures))
        length, vocab = logits.shape
        return rows_of(
            length, self.targets[part], live, temperatures, self.temperature, vocab=vocab, softcap=self.softcap
        )


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# The fields of the ops' inputs that may need a gradient, in the order of HeadGradients.
TRAINED = ("hidden", "head.weight", "head.bias", "head.down", "head.up")


class HeadGradients(NamedTuple):
    """The gradient of hidden and of each tensor of the head; None if it is not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None


def wanted(hidden: Tensor, head: Head) -> list[bool]:
    """Which of HeadGradients are needed."""
    if not torch.is_grad_enabled():
        return [False] * len(TRAINED)
    return [tensor is not None and tensor.requires_grad for tensor in (hidden, *head[:4])]


def wanted_dtypes(hidden: Tensor, head: Head, wants: list[bool]) -> list[torch.dtype | None]:
    tensors = zip((hidden, *head[:4]), wants, strict=True)
    return [tensor.dtype if want and tensor is not None else None for tensor, want in tensors]


def empty_gradients(hidden: Tensor, head: Head, wants: list[bool]) -> HeadGradients:
    """Uninitialised gradients, in float32 because the chunks are summed in it.

    A hidden state belongs to one chunk only, so its gradient may be bfloat16 at once. (In float16 it could underflow.)
    """
    found: list[Tensor | None] = [None] * len(TRAINED)
    for i, tensor in enumerate((hidden, *head[:4])):
        if wants[i] and tensor is not None:
            rounded = i == 0 and tensor.dtype == torch.bfloat16
            found[i] = tensor.new_empty(tensor.shape, dtype=torch.bfloat16 if rounded else torch.float32)
    return HeadGradients(*found)


def scaled(grad_loss: Tensor, grads: Sequence[Tensor], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """grad_loss times the gradients that the forward computed, each in its tensor's dtype; None where not wanted."""
    return [None if dtype is None else (grad_loss * grad).to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def sweep(head: Head, hiddens: tuple[Tensor, ...], fold: Fold, wants: list[bool]) -> HeadGradients:
    """Projects and folds every row of ``hiddens`` (one or two of (live, H)), chunk by chunk; returns the gradients.

    ``fold(rows, logits, grad)`` gets a slice of the rows and their float32 logits, one (n, V) for each of ``hiddens``.
    Where gradients are wanted it writes d loss / d logits of the first of ``hiddens`` into ``grad`` (n, V), which may
    share the memory of those logits, row by row. The second of ``hiddens``, the reference's, is projected without the
    head's adapter and gets no gradient.
    """
    hidden, device = hiddens[0], head.weight.device
    head = head._replace(weight=head.weight.to(hidden.dtype))  # a copy under autocast
    rows, vocab = hidden.shape[0], head.weight.shape[0]
    dtype = product_dtype(hidden)
    in_one = head.weight.dtype == dtype and head.bias is None and head.down is None
    cut = plan(rows, vocab, len(hiddens), device, in_one, wants[1] and dtype != torch.float32)
    columns = tiles(vocab, cut.columns)
    buffers = [empty_logits(cut, vocab, dtype, device) for _ in hiddens]
    sums = _Sums(hidden, head, wants, dtype)
    heads = (head, without_adapter(head))
    with without_autocast(hidden):  # autocast would round the products
        for start in range(0, rows, cut.group):
            group = slice(start, min(start + cut.group, rows))
            inputs = [states[group].to(dtype) for states in hiddens]
            grads = buffers[0][1][: group.stop - start]
            for own, place in chunks(cut, group.stop - start, dtype):
                logits = [buffer[place : place + own.stop - own.start] for buffer, _ in buffers]
                for states, own_head, out in zip(inputs, heads, logits, strict=False):
                    _project(states[own], own_head, columns, out)
                for first in range(own.start, own.stop, cut.fold):
                    part = slice(first, min(first + cut.fold, own.stop))
                    given = tuple(each[part.start - own.start : part.stop - own.start] for each in logits)
                    fold(slice(start + part.start, start + part.stop), given, grads[part] if any(wants) else None)
            if any(wants):
                sums.add(group, inputs[0], grads)
    return sums.grads


def _project(hidden: Tensor, head: Head, columns: list[slice], out: Tensor) -> None:
    """Writes the logits (n, V) of hidden (n, H) to ``out``, in float32 for every dtype of the factors."""
    inner = None
    if head.down is not None:
        inner = matmul(hidden.float(), head.down.float().T).mul_(head.scale)
    tiled = hidden.is_cuda or hidden.dtype == torch.float32  # the engine's bfloat16 product tiles by itself
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
    """The gradients of the head, summed over the chunks, and of the hidden states, written chunk by chunk."""

    def __init__(self, hidden: Tensor, head: Head, wants: list[bool], dtype: torch.dtype) -> None:
        self.head, self.dtype = head, dtype
        self.grads = empty_gradients(hidden, head, wants)
        for total in self.grads[1:]:
            if total is not None:
                total.zero_()

    def add(self, rows: slice, hidden: Tensor, grad: Tensor) -> None:
        """``grad`` (n, V) is d loss / d logits of hidden (n, H), in the same dtype."""
        head, dtype, grads = self.head, self.dtype, self.grads
        inner = None  # d loss / d (hidden down^T)
        if head.up is not None and (grads.hidden is not None or grads.down is not None):
            inner = product(grad, head.up.to(dtype)).mul_(head.scale).to(dtype)
        if grads.hidden is not None:
            grads.hidden[rows] = self._of_hidden(grad, inner)
        if grads.weight is not None:
            add_over_rows_(grads.weight, grad, hidden)
        if grads.bias is not None:
            grads.bias.add_(product(grad.new_ones(1, grad.shape[0]), grad)[0])
        if grads.down is not None and inner is not None:
            grads.down.add_(product(inner.T, hidden))
        if grads.up is not None and head.down is not None:
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
