"""The weights of frozen linear layers, plain or 4-bit, as matrices."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def in_four_bits(layer: nn.Module) -> bool:
    """Whether bitsandbytes holds the layer's weight as packed 4-bit numbers (a Linear4bit)."""
    return getattr(layer.weight, "quant_state", None) is not None


def matrix(layer: Any) -> Tensor:
    """The weight as (O, I): a view, or for a 4-bit weight a new tensor in the dtype that the layer computes in."""
    if in_four_bits(layer):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
    weight: Tensor = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return weight


def kept_packed(layers: Sequence[nn.Module], weights: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Inside, autograd saves the 4-bit weight instead of its ``matrix`` (``weights``, one per layer), and dequantises
    it again in the backward."""
    packed = {w.data_ptr(): layer for layer, w in zip(layers, weights, strict=True) if in_four_bits(layer)}
    if not packed:
        return contextlib.nullcontext()
    # torch calls only the innermost saved-tensor hooks; these call the outer ones, of gradient checkpointing
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack, unpack = outer if outer is not None else (_same, _same)

    def keep(tensor: Tensor) -> Any:
        layer = packed.get(tensor.data_ptr())
        return pack(tensor) if layer is None else layer

    def give(kept: Any) -> Tensor:
        return matrix(kept) if isinstance(kept, nn.Module) else unpack(kept)

    return torch.autograd.graph.saved_tensors_hooks(keep, give)


def _same(kept: Any) -> Any:
    return kept
