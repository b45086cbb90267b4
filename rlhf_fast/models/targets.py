"""Finds the modules of a decoder that get an adapter: its linear layers, except routers and gates.

In transformers 5 the experts of most mixtures are one 3-dimensional parameter, which a linear adapter does not fit.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fast.models.layers import Decoder

# Matches a part of a module's path: gate, shared_expert_gate, router, ... ; gate_proj and gate_up_proj are no gates.
GATE = re.compile(r"(^|_)(gate|router)(_weight)?$")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Targets(NamedTuple):
    """``linear``: the modules that all-linear adapts, by their path in the whole model. ``gates``: paths of linear
    modules that are routers or gates. ``fused``: paths inside a layer of experts that are 3-dimensional parameters."""

    linear: dict[str, nn.Module]
    gates: list[str]
    fused: list[str]

    @property
    def names(self) -> list[str]:
        """The last parts of the linear modules' paths, e.g. ``q_proj``, sorted."""
        return sorted({_last(path) for path in self.linear})


def find_targets(decoder: Decoder) -> Targets:
    """Finds linear modules, gates and fused experts. A gate is recognised by its name (a part of the path ends in gate
    or router) or by its shape: one output, or one output per expert in the block with the experts."""
    experts = _experts(decoder.layers)
    linear: dict[str, nn.Module] = {}
    gates = []
    for path, module in decoder.layers.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            outputs = module.out_features if isinstance(module, nn.Linear) else module.nf
            routes = any(
                outputs == count and path.startswith(block) and not path.startswith(inside) and "att" not in path
                for block, inside, count in experts
            )
            if outputs == 1 or routes or in_gate(path):
                gates.append(f"{decoder.path}.{path}")
            else:
                linear[f"{decoder.path}.{path}"] = module
    fused = {path.split(".", 1)[1] for path, _ in _fused_parameters(decoder.layers)}
    return Targets(linear, gates, sorted(fused))


def in_gate(path: str) -> bool:
    """Whether a part of a module's path names a router or a gate."""
    return any(GATE.search(part) for part in path.split("."))


def inside(decoder: Decoder, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The same modules by their path inside the list of layers instead of the whole model."""
    return {path.removeprefix(f"{decoder.path}."): module for path, module in modules.items()}


def left_out(model: PreTrainedModel, targets: Targets, called: set[str]) -> dict[str, str]:
    """Name of a linear module -> why it gets no adapter. ``called``: the result of ``noting_calls``."""
    reasons = {_last(path): "a router or a gate" for path in targets.gates}
    for name in targets.names:
        reasons.pop(name, None)
        if _means_experts(model, name):
            reasons[name] = "PEFT takes this name for the fused experts"
        elif name not in called:
            reasons[name] = "the model reads its weight without calling it"
    return reasons


def _means_experts(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT applies this name to fused experts. For compatibility with old mixtures it maps gate_proj, up_proj
    and down_proj (or w1, w2 and w3) to the fused parameters, and ignores modules of that name."""
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # two names are fused to one parameter, and only one was given
        return True
    return name not in (config.target_modules or ())


def outside(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules outside the decoder layers that can have an adapter, by path: the head (``lm_head``) and the token
    embedding (``model.embed_tokens``), unless it computes more than a row of its weight times a factor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    found = {path: module for path, module in model.named_modules() if module is head or module is embedding}
    return {path: module for path, module in found.items() if module is head or _looks_up(module)}


def _looks_up(embedding: nn.Module) -> bool:
    own = getattr(embedding, "base_layer", embedding)
    return type(own) is nn.Embedding or hasattr(own, "embed_scale")  # PEFT knows this attribute


def target_modules(
    model: PreTrainedModel, decoder: Decoder, targets: Targets, names: list[str], layer_numbers: list[int] | None
) -> list[str] | str:
    """PEFT's target_modules for the linear modules of these names: the names, if PEFT finds no other modules by them.

    Otherwise (with a vision tower, or with a module ``outside`` and ``layer_numbers``) a regular expression of their
    full paths, with the given layer numbers.
    """
    reached = {path for path, _ in model.named_modules() if _last(path) in names}
    wanted = {path for path in targets.linear if _last(path) in names}
    others = [path for path in outside(model) if _last(path) in names]
    if reached == wanted | set(others) and not (others and layer_numbers):
        return names
    numbers = r"\d+" if layer_numbers is None else f"({'|'.join(map(str, layer_numbers))})"
    paths = sorted({_any_number(path.removeprefix(f"{decoder.path}.").split(".", 1)[1]) for path in wanted})
    in_layers = rf"{re.escape(decoder.path)}\.{numbers}\.({'|'.join(paths)})"
    return "|".join([in_layers, *map(re.escape, others)])


def _any_number(path: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in path.split("."))


@contextmanager
def noting_calls(targets: Targets) -> Iterator[set[str]]:
    """Inside, collects the names of the linear modules whose forward runs. An adapter would have no effect on a module
    whose ``weight`` is read without calling it, as fused state-space kernels do."""
    called: set[str] = set()
    names = {module: _last(path) for path, module in targets.linear.items()}

    def note(module: nn.Module, args: Any) -> None:
        called.add(names[module])

    handles = [module.register_forward_pre_hook(note) for module in names]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _experts(layers: nn.ModuleList) -> list[tuple[str, str, int]]:
    """(path of the block, path of its experts, number of experts), with a dot at each path's end."""
    found = {(path.rsplit(".", 1)[0], count) for path, count in _fused_parameters(layers)}
    found |= {
        (path, len(module))
        for path, module in layers.named_modules()
        if isinstance(module, nn.ModuleList) and "expert" in path
    }
    return [(path.rpartition(".")[0] + ".", path + ".", count) for path, count in found]


def _fused_parameters(layers: nn.ModuleList) -> list[tuple[str, int]]:
    """(path, first dimension) of the weights that look like fused experts: 3-dimensional, or 2-dimensional in a module
    called experts, and not of a gate."""
    return [
        (f"{path}.{name}", parameter.shape[0])
        for path, module in layers.named_modules()
        if not isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS))
        for name, parameter in module.named_parameters(recurse=False)
        if (parameter.dim() == 3 and min(parameter.shape) > 1 or parameter.dim() == 2 and "experts" in path)
        and not name.endswith("bias")
        and not in_gate(f"{path}.{name}")
    ]


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]
