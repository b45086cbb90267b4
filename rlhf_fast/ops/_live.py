"""The rows that an op with an lm head computes: the live ones, side by side."""

from typing import overload

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from ._rows import rows_of
from ._tokens import Tokens


class LiveRows:
    """Takes the live ones out of N rows, hands them to the kernels, and puts results back among zeros.

    On a GPU their number is asked for, which waits for the work before: half the rows of a padded batch are commonly
    dead, and each would cost its matrix products. While a CUDA graph is captured nobody may wait: then every row is
    taken, the dead ones with harmless data, and the kernels pass over them.
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
        """Those rows of ``part`` whose logits (n, V) these are."""
        live, temperatures = (None if each is None else each[part] for each in (self.live, self.temperatures))
        length, vocab = logits.shape
        return rows_of(
            length, self.targets[part], live, temperatures, self.temperature, vocab=vocab, softcap=self.softcap
        )


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
