"""Checks a model's files before transformers reads them, which would guess or fail with an unclear message."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import PreTrainedModel

from rlhf_fast.errors import UserError

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
OBJECTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
OBJECTS += ["special_tokens_map.json", "added_tokens.json"]
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
FLOATING = {"F64", "F32", "F16", "BF16"}
# Names of the tensors that accompany quantised weights: scales, zero points and packed values.
OF_QUANTISED = re.compile(r"[._](weight_scale(_\d)?|(weight_)?scale_inv|scales?|qweight|qzeros|g_idx|absmax|SCB)$")
OF_ATTENTION = re.compile(r"(logit|layer|[qkv]|kv)_scale$")  # scales of models that are not quantised
NUMBER = re.compile(r"\.(\d+)(?=\.)")


def check_files(source: str) -> None:
    """Raises UserError if a JSON file in the folder ``source`` is not an object, or the index of its shards is missing
    or names no tensors. Does nothing if ``source`` is a hub name."""
    folder = Path(source)
    for name in (*OBJECTS, *([] if (folder / WEIGHTS).exists() else [INDEX])):
        if (folder / name).is_file():
            content = _object(folder / name)
            if name == INDEX and not isinstance(content.get("weight_map"), dict):
                raise UserError(f"{folder / name}: expected a weight_map from tensors to files; copy the model again")
    if (
        not (folder / WEIGHTS).exists()
        and not (folder / INDEX).exists()
        and any(folder.glob("model-*-of-*.safetensors"))
    ):
        raise UserError(f"{folder}: its weights are in several files and {INDEX} is missing; copy that one too")


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a valid JSON file ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object; got {json.dumps(content)[:60]}; copy it again")
    return content


def check_sizes(name: str, config: Any) -> None:
    """Raises UserError for a size in the config that is below 1."""
    text = config.get_text_config(decoder=True)
    for size in SIZES:
        value = getattr(text, size, None)
        if isinstance(value, int) and value < 1:
            raise UserError(f"cannot load the model {name}: config.json: {size} must be 1 or more; got {value}")


def check_tensors(source: str, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Raises UserError if quantised weights were read as plain numbers, or if the files have more layers or experts
    than the config. ``unexpected``: names of tensors in the files that the model does not have."""
    unexpected = sorted(unexpected)
    if getattr(model, "hf_quantizer", None) is None:
        beside = [name for name in unexpected if OF_QUANTISED.search(name) and not OF_ATTENTION.search(name)]
        floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        packed = [
            f"{name} ({kind})"
            for name, kind in _stored(source)
            if kind not in FLOATING and name not in unexpected and (name in floating or name.endswith(".weight"))
        ]
        if beside or packed:
            raise UserError(
                f"{source}: it holds quantised weights ({', '.join((packed + beside)[:3])}), and no "
                "quantization_config that transformers knows says how to read them: take the model in bfloat16"
            )
    surplus = next(_surplus(model, unexpected), None)
    if surplus is not None:
        raise UserError(
            f"{source}: it holds weights of {surplus}, beyond those of its config.json (num_hidden_layers or the "
            "like): copy config.json from where the weights are from"
        )


def _surplus(model: PreTrainedModel, unexpected: Iterable[str]) -> Iterator[str]:
    """Items of the model's lists (decoder layers, experts) in ``unexpected`` with an index past the list's end."""
    counts: dict[str, int] = {}
    for name in model.state_dict():
        for path, index in _items(name):
            counts[path] = max(counts.get(path, 0), index + 1)
    # multi-token prediction layers follow the others; transformers ignores them
    ahead = getattr(model.config.get_text_config(decoder=True), "num_nextn_predict_layers", None) or 0
    prefix = f"{model.base_model_prefix}."
    for name in unexpected:
        for path, index in _items(name):
            count = counts.get(path, counts.get(prefix + path))
            if count is not None and index >= count + ahead:
                yield f"{path}.{index}"


def _items(name: str) -> Iterator[tuple[str, int]]:
    """``model.layers.3.mlp.up_proj.weight`` -> (``model.layers``, 3)."""
    for found in NUMBER.finditer(name):
        yield name[: found.start()], int(found[1])


def _stored(source: str) -> Iterator[tuple[str, str]]:
    """Name and dtype of each tensor in the safetensors files of a folder, or of the hub cache."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(str(try_to_load_from_cache(source, "config.json"))).parent
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                yield name, file.get_slice(name).get_dtype()
