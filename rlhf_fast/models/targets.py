"""Which modules of a decoder get an adapter: its linear layers, but never what routes or gates.

In transformers 5 the experts of most mixtures are one parameter of three dimensions, which no linear adapter fits.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fast.models.layers import Decoder

# A part of a module's path: gate, shared_expert_gate, router, ... ; gate_proj and gate_up_proj are no gates.
GATE = re.compile(r"(^|_)(gate|router)(_weight)?$")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Targets(NamedTuple):
    """Paths in the whole model. ``linear``: what all-linear adapts. ``gates``: linear modules that route or gate.
    ``fused``: experts that are parameters of their own, by their path inside a layer."""

    linear: dict[str, nn.Module]
    gates: list[str]
    fused: list[str]

    @property
    def names(self) -> list[str]:
        """The last parts of the linear modules' paths, e.g. ``q_proj``, sorted."""
        return sorted({_last(path) for path in self.linear})

    @property
    def gate_names(self) -> list[str]:
        return sorted({_last(path) for path in self.gates} - set(self.names))


def find_targets(decoder: Decoder) -> Targets:
    """Gates are told by name (a part of the path ends in gate or router) and by shape: one output, or one for each
    expert in the block that holds the experts."""
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
            if outputs == 1 or routes or any(GATE.search(part) for part in path.split(".")):
                gates.append(f"{decoder.path}.{path}")
            else:
                linear[f"{decoder.path}.{path}"] = module
    fused = {path.split(".", 1)[1] for path, _ in _fused_parameters(decoder.layers)}
    return Targets(linear, gates, sorted(fused))


def inside(decoder: Decoder, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The same modules by their path in the list of layers, wherever the whole model keeps that."""
    return {path.removeprefix(f"{decoder.path}."): module for path, module in modules.items()}


def excluded_pattern(model: PreTrainedModel, targets: Targets, names: list[str]) -> str | None:
    """A regular expression for PEFT's exclude_modules: the modules that ``names`` reaches and that get no adapter, such
    as those of a vision tower. None where there are none."""
    reached = [path for path, _ in model.named_modules() if _last(path) in names and path not in targets.linear]
    patterns = sorted({re.sub(r"\d+", r"\\d+", re.escape(path)) for path in reached})
    return "|".join(patterns) or None


@contextmanager
def noting_calls(targets: Targets) -> Iterator[set[str]]:
    """Inside, the set receives the names of the linear modules whose forward runs. A model that reads ``weight`` past
    it, as fused state-space kernels do, would never train an adapter there."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=_last(path): called.add(name))
        for path, module in targets.linear.items()
    ]
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
    """(path, first dimension) of the weights that look like experts: of three dimensions, or of two in a module called
    experts, and not a gate's."""
    return [
        (f"{path}.{name}", parameter.shape[0])
        for path, module in layers.named_modules()
        if not isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS))
        for name, parameter in module.named_parameters(recurse=False)
        if (parameter.dim() == 3 and min(parameter.shape) > 1 or parameter.dim() == 2 and "experts" in path)
        and not name.endswith("bias")
        and not any(GATE.search(part) for part in (*path.split("."), name))
    ]


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]
