"""The identity of a run: version, data, tokenizer, base, adapters that it starts from, settings.

Every checkpoint contains it (``identity`` in state.json). A resumed run compares it with its own and reports changes.
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

# Settings that do not change results.
FREE = {"output_dir", "report_to", "run_name", "logging_steps", "save_steps", "save_total_limit", "trust_remote_code"}
FREE |= {
    "reward_timeout",
    "allow_pickle_weights",
    "monitor_thresholds",
    "resume_from_checkpoint",
    "resume_with_changes",
    "overwrite_output_dir",
}
# Settings that are not compared, because their effect is: the rows, the tokenizer, the weights.
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
# Settings that may change and are reported: the length of the run, its evaluation, and what changes only rounding.
SAID = {"max_steps", "num_train_epochs", "patience", "eval_steps", "micro_batch_size", "micro_batch_tokens"}
SAID |= {"gradient_checkpointing", "monitor_actions"}
SAID |= {"rollout_batch_size", "rollout_engine", "calibration_prompts", "label_noise_ceiling"}
SAMPLES = 16  # values of each weight in the digest of the base


def identity(
    config: StageConfig, base: SharedBase, base_digest: str, trained: Sequence[str], rows: Mapping[str, str]
) -> dict[str, Any]:
    """The identity of a run as JSON. ``trained``: the roles whose weights are in a checkpoint; their initial weights
    are not part of the identity. ``rows``: name of the rows -> their ``fingerprint``."""
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
        if name in settings:  # without folders, so that the run may be resumed from another one
            settings[name] = [os.path.basename(function) for function in settings[name]]
    settings["lora_target_modules"] = sorted(set(config.lora_target_modules))
    return settings


class Changes(NamedTuple):
    """Name -> "old -> new". ``differing``: changes that make it another run. ``allowed``: changes that do not."""

    differing: dict[str, str]
    allowed: dict[str, str]


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The differences between two identities."""
    differing: dict[str, str] = {}
    allowed: dict[str, str] = {}
    for name in then["parts"] | now["parts"]:
        old, new = (str(side["parts"].get(name, "none")) for side in (then, now))
        if old != new:
            differing[name] = f"{one_line(old, 100)} -> {new}"
    for name, value in now["settings"].items():
        old = then["settings"].get(name, value)  # a setting missing in ``then`` is from another version, in "parts"
        if old != value:
            (allowed if name in SAID else differing)[name] = f"{shown(old)} -> {shown(value)}"
    return Changes(differing, allowed)


def setting_changes(then: Mapping[str, Any], config: StageConfig) -> Changes:
    """Like ``changes``, but compares only the settings, without loading data and model."""
    return changes({"parts": {}, "settings": then["settings"]}, {"parts": {}, "settings": _settings(config)})


def told(differences: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({difference})" for name, difference in differences.items())


def fingerprint(rows: Sequence[Any]) -> str:
    """Count and digest of encoded rows in order, including the ``columns`` for reward functions."""
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
    """repr for values that JSON lacks, such as dates, without memory addresses, which differ between runs."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of vocabulary, special tokens, chat template and, for a fast tokenizer, its whole configuration."""
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id]
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    for name in ("padding", "truncation"):  # state of the last call
        backend.pop(name, None)
    return _digest([sorted(tokenizer.get_vocab().items()), ends, tokenizer.chat_template, backend])


def base_digest(model: PreTrainedModel) -> str:
    """A digest of the model's config and of some values of every weight. Call before adapters are added."""
    settings = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    for name in ("transformers_version", "dtype", "torch_dtype"):
        settings.pop(name, None)
    samples = {}
    for name, weight in model.state_dict().items():  # includes saved buffers, such as a router's bias
        flat = weight.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        samples[name] = [list(weight.shape), picked.float().cpu().tolist()]
    return _digest([settings, samples])


def role_digest(base: SharedBase, role: str) -> str:
    """A digest of all weights of an adapter and its head's calibration."""
    digest = blake2b(digest_size=8)
    tensors: dict[str, torch.Tensor] = dict(base.named_parameters(role))
    if role in base.heads:
        tensors |= {"mean": base.heads[role].mean, "std": base.heads[role].std}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
