"""What makes a resumed run the same run: version, data, tokenizer, base, adapters it starts from, settings.

Every checkpoint holds it (``identity`` in state.json); a resume compares it with its own and names what has changed.
"""

import json
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rlhf_fast
from rlhf_fast.config import StageConfig
from rlhf_fast.models import SharedBase
from rlhf_fast.text import one_line, shown

# Settings that change no result.
FREE = {"output_dir", "report_to", "run_name", "logging_steps", "save_steps", "save_total_limit", "trust_remote_code"}
FREE |= {
    "reward_timeout",
    "allow_pickle_weights",
    "resume_from_checkpoint",
    "resume_with_changes",
    "overwrite_output_dir",
}
# Settings whose effect is compared in their place: the rows, the tokenizer, the weights.
COMPARED = {"model_name_or_path", "dtype", "chat_template", "dataset_name", "dataset_split", "eval_dataset_name"}
COMPARED |= {
    "strict",
    "max_unusable_rows",
    "special_tokens_in_data",
    "eval_dataset_split",
    "eval_size",
    "rename_columns",
    "max_samples",
    "sft_adapter",
    "reward_adapter",
}
# Settings that may change, which is said: how long the run is, how it is measured, and what changes rounding alone.
SAID = {"max_steps", "num_train_epochs", "patience", "eval_steps", "micro_batch_size", "micro_batch_tokens"}
SAID |= {"gradient_checkpointing"}
SAID |= {"rollout_batch_size", "rollout_engine", "calibration_prompts", "label_noise_ceiling"}
SAMPLES = 16  # values of each weight that the base is known by


def identity(
    config: StageConfig, base: SharedBase, base_digest: str, trained: Sequence[str], rows: Mapping[str, str]
) -> dict[str, Any]:
    """The identity of a run as JSON. ``trained``: the roles whose weights a checkpoint holds, so that what they started
    from no longer counts. ``rows``: name of the rows -> their ``fingerprint``."""
    frozen = [role for role in base.roles if role not in trained]
    parts = {
        "version of rlhf-fast": rlhf_fast.__version__,
        "base": base_digest,
        "dtype of the base": str(base.dtype).removeprefix("torch."),
        "tokenizer or chat template": tokenizer_digest(base.tokenizer),
        "stop tokens": base.stop_ids,
        **{f"{role} adapter": role_digest(base, role) for role in frozen},
        **rows,
    }
    return json.loads(json.dumps({"parts": parts, "settings": _settings(config)}))


def _settings(config: StageConfig) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(config).items() if name not in FREE | COMPARED}
    for name in ("reward_functions", "eval_functions"):
        if name in settings:  # found from wherever the run is started
            settings[name] = [os.path.basename(function) for function in settings[name]]
    settings["lora_target_modules"] = sorted(set(config.lora_target_modules))
    return settings


class Changes(NamedTuple):
    """Name -> "old -> new": what makes another run, and what may change without that."""

    differing: dict[str, str]
    allowed: dict[str, str]


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """What differs between two identities."""
    differing: dict[str, str] = {}
    allowed: dict[str, str] = {}
    for name in then["parts"] | now["parts"]:
        old, new = (str(side["parts"].get(name, "none")) for side in (then, now))
        if old != new:
            differing[name] = f"{one_line(old, 100)} -> {new}"
    for name, value in now["settings"].items():
        old = then["settings"].get(name, value)  # a setting that is new here is of another version, which is told
        if old != value:
            (allowed if name in SAID else differing)[name] = f"{shown(old)} -> {shown(value)}"
    return Changes(differing, allowed)


def setting_changes(then: Mapping[str, Any], config: StageConfig) -> Changes:
    """As ``changes``, of the settings alone: without data and model at hand."""
    return changes({"parts": {}, "settings": then["settings"]}, {"parts": {}, "settings": _settings(config)})


def told(differences: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({difference})" for name, difference in differences.items())


def fingerprint(rows: Sequence[Any]) -> str:
    """Count and digest of encoded rows, in their order; ``columns`` that reward functions take are part of them."""
    digest = blake2b(digest_size=8)
    for row in rows:
        for item in fields(row):
            _add(digest, getattr(row, item.name))
    return f"{len(rows)} rows, {digest.hexdigest()}"


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, list) and value and isinstance(value[0], int):
        value = array("q", value)
    if hasattr(value, "tobytes"):
        content = value.tobytes()
    else:
        content = json.dumps(value, sort_keys=True, default=_without_address).encode()
    digest.update(len(content).to_bytes(8, "little") + content)


def _without_address(value: Any) -> str:
    """Dates, bytes and the like; an object's place in memory is another in every run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, special tokens, chat template and, where it is a fast one, how it splits text and joins it again."""
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id]
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    for name in ("padding", "truncation"):  # left by the last call
        backend.pop(name, None)
    return _digest([sorted(tokenizer.get_vocab().items()), ends, tokenizer.chat_template, backend])


def base_digest(model: PreTrainedModel) -> str:
    """The model's config and some values of every weight, as they are without adapters."""
    settings = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    for name in ("transformers_version", "dtype", "torch_dtype"):
        settings.pop(name, None)
    samples = {}
    for name, weight in model.state_dict().items():  # with the buffers that are saved, such as a router's bias
        flat = weight.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        samples[name] = [list(weight.shape), picked.float().cpu().tolist()]
    return _digest([settings, samples])


def role_digest(base: SharedBase, role: str) -> str:
    """Every weight of an adapter, and its head's calibration."""
    digest = blake2b(digest_size=8)
    tensors: dict[str, torch.Tensor] = dict(base.named_parameters(role))
    if role in base.heads:
        tensors |= {"mean": base.heads[role].mean, "std": base.heads[role].std}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
