"""Builds PEFT's config for a stage's adapters from its settings and the modules of the model."""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fast.config import ALL_LINEAR, StageConfig
from rlhf_fast.errors import UserError, nearest
from rlhf_fast.models import targets
from rlhf_fast.models.layers import Decoder
from rlhf_fast.models.targets import Targets


@dataclass(frozen=True)
class Adaptable:
    """The modules of a model that can have adapters. ``left_out``: name of a linear module -> why it gets none."""

    model: PreTrainedModel
    decoder: Decoder
    targets: Targets
    left_out: dict[str, str]

    @property
    def names(self) -> list[str]:
        return [name for name in self.targets.names if name not in self.left_out]

    def notes(self) -> list[str]:
        """Notes for the user: linear layers that all-linear does not adapt."""
        notes = []
        if self.targets.fused:
            notes.append(f"the experts ({', '.join(self.targets.fused)}) are fused parameters and are not adapted")
        for reason in sorted(set(self.left_out.values())):
            names = [name for name, why in sorted(self.left_out.items()) if why == reason]
            notes.append(f"not adapted, {reason}: {', '.join(names)}")
        return notes

    def config(self, asked: StageConfig) -> LoraConfig:
        """PEFT's config for these settings.

        Raises UserError for a module that does not exist or gets no adapter, and for more layers than the model has.
        """
        names = [
            name for given in asked.lora_target_modules for name in (self.names if given == ALL_LINEAR else [given])
        ]
        self._check(names)
        count, top = len(self.decoder.layers), asked.lora_layers
        if top is not None and top > count:
            raise UserError(f"--lora_layers must be at most {count}, the number of decoder layers; got {top}")
        chosen = None if top is None else list(range(count - top, count))
        modules = targets.target_modules(self.model, self.decoder, self.targets, names, chosen)
        by_name = chosen is not None and not isinstance(modules, str)  # a regular expression contains the layers
        return LoraConfig(
            r=asked.lora_r,
            lora_alpha=asked.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides it by r, so a float works
            lora_dropout=asked.lora_dropout,
            target_modules=modules,
            layers_to_transform=chosen if by_name else None,
            layers_pattern=[self.decoder.list_name] if by_name else None,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in self.targets.linear.values()),
            task_type="CAUSAL_LM",
        )

    def _check(self, names: list[str]) -> None:
        known = [*self.names, *(path.rsplit(".", 1)[-1] for path in targets.outside(self.model))]
        there = f"there are {', '.join(known)}"
        if not names:
            raise UserError(f"--lora_target_modules must name a module: {ALL_LINEAR}, or some of {', '.join(known)}")
        for name in names:
            if name in self.left_out:
                raise UserError(f"--lora_target_modules: {name!r} gets no adapter ({self.left_out[name]}); {there}")
            if name not in known:
                raise UserError(
                    f"--lora_target_modules: no linear module {name!r} in this model's layers{nearest(name, known)}; "
                    f"{there}"
                )


def differences(asked: LoraConfig, taken: LoraConfig) -> list[str]:
    """Notes on how the config of a copied adapter differs from the requested one, such as ``r is its 8, not 4``."""
    found = []
    for field in ("r", "lora_alpha", "target_modules", "layers_to_transform"):
        wanted, its = (_listed(getattr(config, field)) for config in (asked, taken))
        if wanted != its:
            found.append(f"{field} is its {', '.join(its)}, not {', '.join(wanted)}")
    return found


def _listed(value: Any) -> list[str]:
    return sorted(map(str, value)) if isinstance(value, (list, set, tuple)) else [str(value)]
