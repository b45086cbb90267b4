"""The decoder with a key-value cache."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf_fast.models import Merged, SharedBase


class CachedDecoder:
    """Decodes a batch with the adapter of ``merged``, a few columns (token positions) at a time.

    ``mask``: (B, T) of the prompts, padded left, 1 = token. ``capacity``: the number of columns that may follow.
    """

    def __init__(self, base: SharedBase, merged: Merged, mask: Tensor, capacity: int) -> None:
        self.merged, self.body = merged, base.decoder.body
        self._mask = torch.cat([mask, mask.new_ones(len(mask), capacity)], dim=1)
        self._positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
        self._columns = 0
        self._cache = DynamicCache(config=base.model.config)
        self._cache.layers = [
            PreallocatedLayer(self._mask.shape[1]) if type(layer) is DynamicLayer else layer
            for layer in self._cache.layers
        ]
        names = inspect.signature(self.body.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # the older one

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Appends ids (B, T), the next columns. Returns the last hidden states (B, H) of the last column."""
        start, self._columns = self._columns, self._columns + ids.shape[1]
        with self.merged.in_use():
            output = self.body(
                input_ids=ids,
                attention_mask=self._mask[:, : self._columns],
                position_ids=self._positions[:, start : self._columns],
                use_cache=True,
                **{self._cache_name: self._cache},
            )
        return output.last_hidden_state[:, -1].contiguous()  # matmul would copy the weight for strided rows

    def keep(self, rows: Tensor) -> None:
        """Keeps only the rows with these indices (n,) in the batch, in this order."""
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._cache.reorder_cache(rows)


class PreallocatedLayer(DynamicLayer):
    """A cache layer with memory for ``capacity`` columns, filled from the left. transformers' layer copies the whole
    cache at each token.

    Replaces only layers that cache every token. Layers with a window or a state are left to transformers, because the
    size of their copies is bounded.
    """

    is_initialized: bool  # from transformers' class

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.room = [
                states.new_empty(*states.shape[:2], self.capacity, states.shape[3])
                for states in (key_states, value_states)
            ]
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        end = self.length + key_states.shape[2]
        self.room[0][:, :, self.length : end] = key_states
        self.room[1][:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self.room = [room.index_select(0, beam_idx) for room in self.room]
