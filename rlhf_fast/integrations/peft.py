"""PEFT's LoRA layers computed by ``lora_linear``, in anybody's model: fuse(model), and unfuse(model) takes it back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.ops import lora_linear


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
    left = {name: reason for name, layer in found.items() if (reason := _why_not(layer)) is not None}
    layers = {name: layer for name, layer in found.items() if name not in left}
    for layer in layers.values():
        layer.__class__ = FusedLinear
        layer._fused_group = None
    groups = [] if example is None else _read_together(model, layers, example)
    for names in groups:
        group = _Group([layers[name] for name in names])
        for name in names:
            layers[name]._fused_group = group
    return Fused([*layers], groups, left)


def unfuse(model: nn.Module) -> None:
    """Has PEFT compute its layers again. A model that is not fused is left as it is."""
    for module in model.modules():
        if isinstance(module, FusedLinear):
            module.__class__ = Linear
            del module._fused_group


class FusedLinear(Linear):
    """PEFT's layer; its class alone is exchanged."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or _not_now(self) is not None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        if self._fused_group is None or torch.compiler.is_compiling():
            return _outputs(x, [self])[0]
        return self._fused_group.output(self, x)


class _Group:
    """Layers that read the same input: the first one that is called computes all, and the others fetch theirs."""

    def __init__(self, layers: list[FusedLinear]) -> None:
        self.layers = layers
        self.ready: dict[FusedLinear, Tensor] = {}
        self.input: Tensor | None = None
        self.state: tuple[Any, ...] = ()

    def output(self, layer: FusedLinear, x: Tensor) -> Tensor:
        state = _state(x)
        if layer in self.ready and x is self.input and state == self.state:
            output = self.ready.pop(layer)
            if not self.ready:
                self.input = None
            return output
        together = [layer, *(each for each in self.layers if each is not layer)]
        if (
            layer is not self.layers[0]
            or len({_dropout(each) for each in together}) > 1
            or any(map(_not_now, together))
        ):
            together = [layer]
        outputs = _outputs(x, together)
        self.ready = dict(zip(together[1:], outputs[1:], strict=True))
        self.input, self.state = x if self.ready else None, state
        return outputs[0]


def _state(x: Tensor) -> tuple[Any, ...]:
    """What must be the same when another layer of the group fetches its output."""
    autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    return torch.is_grad_enabled(), autocast, None if x.is_inference() else x._version


def _outputs(x: Tensor, layers: list[FusedLinear]) -> tuple[Tensor, ...]:
    bases = [layer.base_layer for layer in layers]
    weights = [base.weight.T if isinstance(base, Conv1D) else base.weight for base in bases]
    return lora_linear(
        x,
        weights,
        [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
         for layer in layers for name in _active(layer)],
        biases=[base.bias for base in bases],
        dropout=_dropout(layers[0]),
    )  # fmt: skip


def _active(layer: Linear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _dropout(layer: Linear) -> float:
    module = layer.lora_dropout[_active(layer)[0]]
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def _why_not(layer: LoraLayer) -> str | None:
    """Why the layer cannot be fused; None where it can."""
    base = layer.get_base_layer()
    if type(layer) not in (Linear, FusedLinear) or type(base) not in (nn.Linear, Conv1D):
        return f"a {type(layer).__module__}.{type(layer).__name__} over {type(base).__name__}"
    if layer.base_layer is not base:
        return "its base layer is wrapped more than once"
    for part in (layer, base):
        if "forward" in vars(part):
            return "something else has replaced its forward"
    if hasattr(base.weight, "full_tensor"):
        return "its weight is spread over ranks"
    return _not_now(layer)


def _not_now(layer: Linear) -> str | None:
    """Why PEFT computes the layer as things stand: this may change from call to call."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapter is merged"
    active = _active(layer)
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    name = active[0]
    if name in layer.lora_variant:
        return f"its adapter is a {type(layer.lora_variant[name]).__name__}"
    if layer.lora_B[name].bias is not None:
        return "its adapter has a bias"
    dropout = layer.lora_dropout[name]
    if not isinstance(dropout, nn.Identity) and type(dropout) is not nn.Dropout:
        return f"its dropout is a {type(dropout).__name__}"
    for part in (layer.base_layer, layer.lora_A[name], layer.lora_B[name], dropout):
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return "a part of it has hooks"
    return None


def _read_together(model: nn.Module, layers: dict[str, FusedLinear], example: Mapping[str, Any]) -> list[list[str]]:
    """Names of the layers of one module that are called in turn, once, with the very same tensor."""
    calls: list[str] = []
    groups: list[list[str]] = []
    last: list[Any] = [None, None]  # the module that holds the layer called last, and what it was called with

    def seen(name: str, args: tuple[Any, ...]) -> None:
        calls.append(name)
        parent, x = name.rpartition(".")[0], args[0] if args else None
        if x is not None and parent == last[0] and x is last[1]:
            groups[-1].append(name)
        else:
            groups.append([name])
        last[:] = parent, x

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen(name, args)) for name, layer in layers.items()
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(**example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return [group for group in groups if len(group) > 1 and all(calls.count(name) == 1 for name in group)]
