"""Makes ``lora_linear`` compute PEFT's LoRA layers: several layers in one call, and rows of several roles in one pass.

Also layers without an adapter, on processors where the engine's float32 product is faster than torch's.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.base_weights import in_four_bits, kept_packed, matrix
from rlhf_fast.ops import build_info, lora_linear

# (role, number of rows) of consecutive rows of the current pass; a role None has no adapter. If _roles is None, the
# active adapter of PEFT computes all rows. A plain global, so that torch.compile guards on it.
_roles: Sequence[tuple[str | None, int]] | None = None


@contextlib.contextmanager
def roles(rows: Sequence[tuple[str | None, int]]) -> Iterator[None]:
    """Inside, fused layers apply the adapter of the first role to the first rows of their input, flattened to (N, I),
    that of the second role to the next rows, and so on. PEFT's active adapter is ignored."""
    global _roles
    outer, _roles = _roles, tuple(rows)
    try:
        yield
    finally:
        _roles = outer


def given_roles() -> Sequence[tuple[str | None, int]] | None:
    """The argument of the surrounding ``roles``, if any."""
    return _roles


def fuse(layers: dict[str, LoraLayer]) -> dict[str, str]:
    """Replaces the class of PEFT's layers on nn.Linear, Conv1D and bitsandbytes' Linear4bit. Returns name -> reason for
    the layers that it does not replace."""
    left = {name: reason for name, layer in layers.items() if (reason := why_not(layer)) is not None}
    for name, layer in layers.items():
        if name not in left:
            if not isinstance(layer, FusedLayer):
                layer.__class__ = _fused_class(_pefts(layer))
            layer._fused_group = None
    return left


def unfuse(model: nn.Module) -> None:
    """Undoes ``fuse``. Does nothing to a model that is not fused."""
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.__class__ = _pefts(module)
            del module._fused_group


class PlainLinear(nn.Linear):
    """nn.Linear computed by the engine's product. Existing modules get this class; nothing else of them changes."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = lora_linear(input, self.weight, None, biases=self.bias)
        return output


def exchange_plain(model: nn.Module) -> None:
    """Replaces the class of every nn.Linear on the CPU whose dtype the engine multiplies on this processor."""
    info = build_info()
    products = {torch.float32: "float32_products", torch.bfloat16: "bfloat16_products"}
    exchanged = {dtype for dtype, name in products.items() if info.get(name) == "rlhf-fast"}
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            weight = module.weight
            if weight.dtype in exchanged and weight.device.type == "cpu":
                module.__class__ = PlainLinear


class FusedLayer:
    """Marks a layer of PEFT whose class ``fuse`` has replaced by one with ``_forward`` as its forward."""


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or (_roles is None and _not_now(self) is not None):
        output: Tensor = _pefts(self).forward(self, x, *args, **kwargs)
        return output
    if self._fused_group is None or torch.compiler.is_compiling():
        return _outputs(x, [self])[0]
    output = self._fused_group.output(self, x)
    return output


class FusedLinear(Linear, FusedLayer):
    forward = _forward


@functools.cache
def _fused_class(kind: Any) -> Any:
    """The fused subclass of PEFT's class ``kind``. Created at run time for 4-bit layers, because PEFT's class can be
    imported only if bitsandbytes is installed."""
    return FusedLinear if kind is Linear else type(f"Fused{kind.__name__}", (kind, FusedLayer), {"forward": _forward})


def _pefts(layer: LoraLayer) -> Any:
    """The layer's class in PEFT."""
    return type(layer).__bases__[0] if isinstance(layer, FusedLayer) else type(layer)


class EmbeddingByRole(Embedding):
    """PEFT's layer on the token embedding, which also follows ``roles``. Existing layers get this class."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _roles is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        parts = x.flatten().split([count for _, count in _roles])
        rows = [under(self, role).forward(part) for (role, _), part in zip(_roles, parts, strict=True)]
        return torch.cat(rows).view(*x.shape, -1)


def under(layer: Embedding, role: str | None) -> nn.Module:
    """The embedding with the role's adapter, whatever PEFT's active one is, or the base's own if it has none. Shares
    all weights with ``layer``."""
    if role not in layer.lora_embedding_A:
        return layer.base_layer
    twin = copy.copy(layer)
    twin.__class__ = Embedding
    twin._active_adapter, twin._disable_adapters = [role], False
    return twin


class _Group:
    """Layers that read the same input: the first one computes the outputs of all, and the others fetch theirs."""

    def __init__(self, layers: list[LoraLayer]) -> None:
        self.layers = layers
        self.ready: dict[LoraLayer, Tensor] = {}
        self.input: Tensor | None = None
        self.state: tuple[Any, ...] = ()

    def output(self, layer: LoraLayer, x: Tensor) -> Tensor:
        state = _state(x)
        if layer in self.ready and x is self.input and state == self.state:
            output = self.ready.pop(layer)
            if not self.ready:
                self.input = None
            return output
        together = [layer, *(each for each in self.layers if each is not layer)]
        if layer is not self.layers[0] or not _agree(together):
            together = [layer]
        outputs = _outputs(x, together)
        self.ready = dict(zip(together[1:], outputs[1:], strict=True))
        self.input, self.state = x if self.ready else None, state
        return outputs[0]


def _agree(layers: list[LoraLayer]) -> bool:
    """Whether the layers can be computed in one call at the moment."""
    if _roles is None and any(map(_not_now, layers)):
        return False
    return len({_dropout(layer) for layer in layers}) == 1


def _state(x: Tensor) -> tuple[Any, ...]:
    """State that must not change between the first layer's call and another layer's fetch of its output."""
    autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    return _roles, torch.is_grad_enabled(), autocast, None if x.is_inference() else x._version


def _outputs(x: Tensor, layers: list[LoraLayer]) -> tuple[Tensor, ...]:
    bases = [layer.base_layer for layer in layers]
    weights = [matrix(base) for base in bases]
    given = _roles
    segments = [(None, 0)] if given is None else given
    names = [[_active(layer)[0] if given is None else role for layer in layers] for role, _ in segments]
    loras = [[_lora(layer, name) for layer, name in zip(layers, each, strict=True)] for each in names]
    with kept_packed(bases, weights):
        return lora_linear(
            x,
            weights,
            loras[0] if given is None else loras,
            biases=[base.bias for base in bases],
            dropout=_dropout(layers[0]),
            rows=None if given is None else [count for _, count in given],
        )


def _lora(layer: LoraLayer, name: str | None) -> tuple[Tensor, Tensor, float] | None:
    if name not in layer.lora_A:
        return None
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _active(layer: LoraLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _dropout(layer: LoraLayer) -> float:
    """The dropout probability of the active adapter; for several roles, the largest of those in train mode."""
    given = _roles
    names = _active(layer)[:1] if given is None else [name for name, _ in given if name in layer.lora_dropout]
    modules = [layer.lora_dropout[name] for name in names]
    return max([0.0, *(each.p for each in modules if isinstance(each, nn.Dropout) and each.training)])


def why_not(layer: LoraLayer) -> str | None:
    """Why the layer cannot be fused; None if it can."""
    base = layer.get_base_layer()
    kind = _pefts(layer)
    plain = kind is Linear and type(base) in (nn.Linear, PlainLinear, Conv1D)
    if not plain and not (kind.__name__ == "Linear4bit" and in_four_bits(base)):
        return f"a {type(layer).__module__}.{type(layer).__name__} over {type(base).__name__}"
    if layer.base_layer is not base:
        return "its base layer is wrapped more than once"
    for part in (layer, base):
        if "forward" in vars(part):
            return "something else has replaced its forward"
    if hasattr(base.weight, "full_tensor"):
        return "its weight is spread over ranks"
    return _not_now(layer)


def _not_now(layer: LoraLayer) -> str | None:
    """Why PEFT must compute the layer in its current state, which may change from call to call; None = it need not."""
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


class Calls(NamedTuple):
    """The calls of layers in a forward pass."""

    groups: list[list[str]]  # names of layers of one module that read the same tensor in consecutive calls
    sizes: set[int]  # numbers of rows of the layers' inputs (..., I)


def group(layers: dict[str, LoraLayer], run: Callable[[], Any]) -> Calls:
    """Groups layers that read the same input, such as the projections to query, key and value, to be computed in one
    call. ``run``: a forward pass on a few tokens, in which these layers are found."""
    calls = _calls(layers, run)
    for names in calls.groups:
        together = _Group([layers[name] for name in names])
        for name in names:
            layers[name]._fused_group = together
    return calls


def _calls(layers: dict[str, LoraLayer], run: Callable[[], Any]) -> Calls:
    called: list[str] = []
    groups: list[list[str]] = []
    sizes: set[int] = set()
    last: list[Any] = [None, None]  # the parent module and the input of the layer called last

    def seen(name: str, args: tuple[Any, ...]) -> None:
        called.append(name)
        parent, x = name.rpartition(".")[0], args[0] if args else None
        if x is not None and parent == last[0] and x is last[1]:
            groups[-1].append(name)
        else:
            groups.append([name])
        sizes.add(-1 if x is None else x.shape[:-1].numel())
        last[:] = parent, x

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen(name, args)) for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    groups = [group for group in groups if len(group) > 1 and all(called.count(name) == 1 for name in group)]
    return Calls(groups, sizes)
