"""PEFT's LoRA layers computed by ``lora_linear``, in anybody's model: fuse(model), and unfuse(model) takes it back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from rlhf_fast import lora_layers
from rlhf_fast.lora_layers import unfuse

__all__ = ["Fused", "fuse", "unfuse"]


class Fused(NamedTuple):
    """What ``fuse`` did: names of modules in the model."""

    layers: list[str]  # that are computed by lora_linear
    groups: list[list[str]]  # those of them that read the same input and are computed together
    left: dict[str, str]  # LoRA layers that PEFT goes on computing -> why


def fuse(model: nn.Module, example: Mapping[str, Any] | None = None) -> Fused:
    """Has the LoRA layers over nn.Linear and Conv1D computed by ``rlhf_fast.lora_linear``: results within rounding.

    Parameters, names, state_dict, config and saving stay as they are, and so does everything of PEFT: adapters may be
    switched, disabled, merged and added later, and what is then no single plain adapter is computed by PEFT. A second
    derivative is refused.

    Args:
        model: a model with PEFT's adapters, of get_peft_model or add_adapter. Changed in place.
        example: keyword arguments of a forward of the model, of a few tokens. It is run once, without gradients and
            dropout, to see which layers of a module read the very same tensor one after the other, as the projections
            to query, key and value do: these are then computed together. None computes each layer on its own.

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
