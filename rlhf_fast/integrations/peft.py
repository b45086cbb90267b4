"""Makes ``lora_linear`` compute the LoRA layers of any PEFT model: fuse(model). unfuse(model) undoes it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from rlhf_fast import lora_layers
from rlhf_fast.lora_layers import unfuse

__all__ = ["Fused", "fuse", "unfuse"]


class Fused(NamedTuple):
    """The result of ``fuse``: names of modules in the model."""

    layers: list[str]  # layers that lora_linear computes
    groups: list[list[str]]  # layers with the same input, which are computed in one call
    left: dict[str, str]  # LoRA layers that PEFT still computes -> why


def fuse(model: nn.Module, example: Mapping[str, Any] | None = None) -> Fused:
    """Makes ``rlhf_fast.lora_linear`` compute the LoRA layers on nn.Linear and Conv1D, with results up to rounding.

    Parameters, names, state_dict, config and saving do not change. PEFT's functions still work: adapters can be
    switched, disabled, merged and added later. PEFT computes a layer whenever it does not have exactly one plain active
    adapter. A second derivative raises an error.

    Args:
        model: a model with PEFT's adapters, from get_peft_model or add_adapter. Changed in place.
        example: keyword arguments for a forward pass of the model on a few tokens. The pass is run once, without
            gradients and dropout, to find layers of a module that read the same tensor one after another, such as the
            projections to query, key and value. These are then computed in one call. None: each layer by itself.

    Raises:
        TypeError: the model has no LoRA layer.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not found:
        raise TypeError(f"fuse: {type(model).__name__} has no LoRA layer of PEFT; get_peft_model gives it some")
    left = lora_layers.fuse(found)
    layers = {name: layer for name, layer in found.items() if name not in left}
    groups: list[list[str]] = []
    if example is not None:
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            groups = lora_layers.group(layers, lambda: model(**example)).groups
        finally:
            for module, mode in modes.items():
                module.training = mode
    return Fused([*layers], groups, left)
