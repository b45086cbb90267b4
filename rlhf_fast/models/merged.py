"""A role's adapter merged into copies of the weights that it adapts, for passes without gradient.

The base's weights are never written. While the copies are in use, they replace the adapted modules in the model.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fast import lora_layers
from rlhf_fast.base_weights import in_four_bits, matrix
from rlhf_fast.errors import UserError
from rlhf_fast.ops import PackedWeight


class Merged:
    """The adapted linear modules of one role, except the head: W + scale * B A, summed in float32 and rounded once to
    the base's dtype. The copy of a 4-bit weight has the dtype that the layer computes in.

    A module without an adapter of this role is the base's own. ``bytes`` is the size of the copies. The copies do not
    follow later changes of the adapter. The token embedding is not copied: the adapter is added to the rows looked up.
    """

    def __init__(self, model: PreTrainedModel, role: str | None) -> None:
        head = model.get_output_embeddings()
        found = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, LoraLayer) and module is not head
        ]
        adapted = {module for _, module in found if role in module.lora_A}  # without the embedding
        for module in adapted:
            _check(module, role)
        self.bytes = sum(_bytes(module.base_layer) for module in adapted)
        _check_memory(self.bytes, next(model.parameters()).device)
        self._places = [
            (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], module) for path, module in found
        ]
        self._modules = [_module(module, role) for _, module in found]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the model computes with the merged modules."""
        try:
            for (parent, name, _), module in zip(self._places, self._modules, strict=True):
                parent._modules[name] = module
            yield
        finally:
            for parent, name, module in self._places:
                parent._modules[name] = module


def _module(module: LoraLayer, role: str | None) -> nn.Module:
    if isinstance(module, Embedding):
        return lora_layers.under(module, role)
    return _merged(module, role) if role in module.lora_A else module.base_layer


def why_not_merge(model: nn.Module) -> str | None:
    """None if ``Merged`` can copy every adapted module; else the reason."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, Embedding) and not _plain(module.base_layer):
            return f"{path} is a {type(module.base_layer).__name__}, which an adapter is not merged into"
    return None


def _plain(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, Conv1D)) and (layer.weight.is_floating_point() or in_four_bits(layer))


def _bytes(layer: Any) -> int:
    """The size of a copy of the weight."""
    if in_four_bits(layer):
        return int(layer.out_features * layer.in_features * layer.compute_dtype.itemsize)
    return int(layer.weight.nbytes)


def _check(module: LoraLayer, role: str | None) -> None:
    if not _plain(module.base_layer):
        raise UserError(
            f"an adapter is not merged into a {type(module.base_layer).__name__}: set --rollout_engine transformers"
        )


def _check_memory(needed: int, device: torch.device) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"sampling needs {needed / 1e9:.2f} GB for a copy of the adapted weights with the adapter merged, and "
            f"{free / 1e9:.2f} GB are free: set --rollout_engine transformers, which makes none, or lower --lora_layers"
        )


class PackedLinear(nn.Module):
    """nn.Linear in bfloat16 on the CPU, with its weight packed. Bitwise equal to the plain layer."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = PackedWeight(weight), bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight.linear(hidden, self.bias)


@torch.no_grad()
def _merged(module: LoraLayer, role: str | None) -> nn.Module:
    layer = module.base_layer
    down, up = module.lora_A[role].weight.float(), module.lora_B[role].weight.float()
    own = matrix(layer)
    weight = torch.addmm(own.float(), up, down, alpha=module.scaling[role]).to(own.dtype)
    if not isinstance(layer, Conv1D) and PackedWeight.can_pack(weight):
        return PackedLinear(weight, layer.bias)
    if isinstance(layer, Conv1D):
        weight = weight.T.contiguous()
    twin = _plain_linear(layer) if in_four_bits(layer) else copy.copy(layer)
    twin._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return twin


def _plain_linear(layer: Any) -> nn.Linear:
    """A plain linear layer of the same sizes, without data."""
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
