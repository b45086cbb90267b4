"""Saves and loads roles in PEFT's format: adapter_config.json and adapter_model.safetensors.

A role with a head is saved as a sequence classifier (task SEQ_CLS, ``score`` in modules_to_save), so that PEFT and
transformers load it as AutoModelForSequenceClassification(num_labels=1). ``calibration.json`` has the mean and standard
deviation of the head's scores; PPO uses (score − mean) / std.
"""

import json
import math
import os
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rlhf_fast.errors import UserError
from rlhf_fast.models import identity, targets
from rlhf_fast.models.heads import ScoreHead
from rlhf_fast.models.shared import SharedBase

CONFIG, WEIGHTS, CALIBRATION = "adapter_config.json", "adapter_model.safetensors", "calibration.json"
OVER_THE_SAME_BASE = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # values of init_lora_weights that do not change the base
PREFIX = "base_model.model."  # PEFT's name for the wrapped transformers model


def save_role(base: SharedBase, role: str, folder: Path, *, parameters: dict[str, torch.Tensor] | None = None) -> None:
    """Writes a role's adapter, head, calibration and the digest of its base into ``folder``. Equal roles give equal
    bytes.

    ``parameters``: tensors to write instead of the current ones, by the names of ``base.named_parameters(role)``.
    """
    assert base.peft is not None
    folder.mkdir(parents=True, exist_ok=True)
    lora = LoraConfig(**base.peft.peft_config[role].to_dict())
    source = base.model.name_or_path
    lora.base_model_name_or_path = os.path.abspath(source) if os.path.isdir(source) else source
    lora.inference_mode = True
    if isinstance(lora.target_modules, set):  # PEFT would write it in arbitrary order
        lora.target_modules = sorted(lora.target_modules)
    identity.write(folder, base.fingerprint)
    if role in base.heads:
        head = base.heads[role]
        lora.task_type, lora.modules_to_save = "SEQ_CLS", ["score"]  # type: ignore[assignment]
        constants = {"mean": head.mean.item(), "std": head.std.item()}
        (folder / CALIBRATION).write_text(json.dumps(constants, indent=2) + "\n")
    tensors = base.named_parameters(role) if parameters is None else parameters
    save_file({PREFIX + name: _plain(tensor) for name, tensor in tensors.items()}, folder / WEIGHTS)
    lora.save_pretrained(str(folder))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def load_role(base: SharedBase, role: str, folder: str | Path, *, want_head: bool = False) -> None:
    """Loads a role that ``save_role`` or PEFT wrote. ``want_head``: True = it must have a ``score`` head, False = it
    must not.

    Raises UserError for a missing folder or file, a missing or unwanted head, a damaged file, NaN or infinity in it, or
    an adapter made for other weights. If the config only names another base, ``base.notes`` gets a note.
    """
    lora, state = read_adapter(folder)
    state = without_base_weights(folder, state, base.model)
    named, own = lora.base_model_name_or_path, base.model.name_or_path
    note = identity.check(f"adapter {role}", Path(folder), named, base.fingerprint, own)
    if note is not None:
        base.notes.append(note)
    score = [name for name in state if name.endswith("score.weight")]
    head = state.pop(score[0]) if score else None
    if want_head and head is None:
        raise UserError(
            f"{folder}: no score head in {WEIGHTS}; expected a reward model as `rlhf-fast reward` writes it"
        )
    if not want_head and head is not None:
        raise UserError(f"{folder} holds a reward model (it has a score head); expected an adapter without one")
    lora.task_type, lora.modules_to_save = "CAUSAL_LM", None  # type: ignore[assignment]
    try:
        base.load_role(role, lora, state, same_base=identity.proven(Path(folder), base.fingerprint))
    except UserError as error:
        raise UserError(f"{error} (in {folder})") from error
    if want_head and head is not None:
        base.add_head(role, _head(head, Path(folder) / CALIBRATION))


def read_adapter(folder: str | Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """PEFT's config and tensors from a folder. Raises UserError if they are missing, damaged, or no LoRA adapter."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"no adapter folder {folder}; train it first, or name another")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing: expected an adapter folder in PEFT's format")
    try:
        start = LoraConfig.from_json_file(str(path / CONFIG)).get("init_lora_weights", True)
        if start not in OVER_THE_SAME_BASE:
            raise UserError(
                f"{path / CONFIG}: init_lora_weights is {start!r}: that initialisation changed the base, so the "
                "adapter does not fit the model it names; save it again as a plain LoRA adapter (PEFT's "
                "save_pretrained with path_initial_model_for_weight_conversion)"
            )
        lora = LoraConfig.from_pretrained(str(path))
        state = load_file(path / WEIGHTS)
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise UserError(f"{folder}: the adapter cannot be read: {error}") from error
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path / WEIGHTS}: {name} holds NaN or infinity; train the adapter again")
    if not isinstance(lora, LoraConfig):
        raise UserError(f"{path / CONFIG}: expected a LoRA adapter; got {type(lora).__name__}")
    for name, kinds, least in (("r", int, 1), ("lora_alpha", (int, float), 0), ("lora_dropout", (int, float), 0)):
        value = getattr(lora, name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
            kind = "whole" if kinds is int else "finite"
            raise UserError(f"{path / CONFIG}: {name} must be a {kind} number from {least} on; got {value!r}")
    lora.init_lora_weights = True  # skips PEFT's own initialisation; the loaded tensors replace it
    if not lora.target_modules:
        raise UserError(f"{path / CONFIG}: target_modules names no module, so this adapter changes nothing")
    return lora, state


def without_base_weights(
    folder: str | Path, state: dict[str, torch.Tensor], model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """The adapter's tensors without those of the base: PEFT saves the whole weight of a head or token embedding with an
    adapter on it. Raises UserError if they are not the weights of ``model``, up to the rounding of bfloat16."""
    own = {
        f"{PREFIX}{path}.base_layer.{name}": parameter
        for path, module in targets.outside(model).items()
        for name, parameter in getattr(module, "base_layer", module).named_parameters()
    }
    for key in own.keys() & state.keys():
        mine, saved = own[key], state[key]
        if saved.shape != mine.shape or not torch.allclose(saved.to(mine), mine, rtol=2**-7, atol=1e-6):
            raise UserError(
                f"{folder}: {key} in it is not the weight of this base: the adapter was made for another base, or "
                "beside changed weights (of new tokens?), which the roles cannot share"
            )
    return {key: tensor for key, tensor in state.items() if key not in own}


def _head(weight: torch.Tensor, calibration: Path) -> ScoreHead:
    if weight.shape[0] != 1:
        raise UserError(f"{calibration.parent}: expected a score head of one label; got {weight.shape[0]}")
    head = ScoreHead(weight.shape[1])
    with torch.no_grad():
        head.weight.copy_(weight)
    if calibration.is_file():
        try:
            constants = json.loads(calibration.read_text())
            mean, std = float(constants["mean"]), float(constants["std"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{calibration} is damaged ({error!r}); expected mean and std as JSON") from error
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise UserError(f"{calibration}: expected a finite mean and a std above 0; got {mean} and {std}")
        head.calibrate(mean, std)
    return head
