"""Adapters recognise their base by its weights, since folders move and names can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import randomise, save_model, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, adapters, identity, load_pretrained
from rlhf_fast.models.merge import merge


@pytest.fixture
def model(tmp_path: Path, tokenizer_folder: Path) -> Path:
    return save_model(tmp_path / "model", tokenizer_folder, "llama")


@pytest.fixture
def fine_tuned(tmp_path: Path, model: Path) -> Path:
    """The same shapes and names, other weights."""
    folder = tmp_path / "tuned"
    shutil.copytree(model, folder)
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.layers[3].self_attn.q_proj.weight.mul_(1.05)
    changed.save_pretrained(folder)
    return folder


@pytest.fixture
def load() -> Callable[..., SharedBase]:
    def make(folder: Path, **changes: Any) -> SharedBase:
        config = settings(model_name_or_path=str(folder), **changes)
        return SharedBase(*load_pretrained(config, torch.device("cpu")), config)

    return make


@pytest.fixture
def adapter(tmp_path: Path, model: Path, load: Callable[..., SharedBase]) -> Path:
    base = load(model)
    base.add_role("policy")
    randomise(base, "policy", 0)
    adapters.save_role(base, "policy", tmp_path / "adapter")
    base.tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def named(folder: Path, name: str | None) -> None:
    config = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": name}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_it_was_made_for_is_taken_without_a_word(
    model: Path, adapter: Path, load: Callable[..., SharedBase], dtype: str
) -> None:
    base = load(model, dtype=dtype)
    adapters.load_role(base, "sft", adapter)
    assert base.notes == []


def test_a_base_that_has_moved_is_taken_and_said(
    model: Path, adapter: Path, tmp_path: Path, load: Callable[..., SharedBase]
) -> None:
    model.rename(tmp_path / "moved")
    base = load(tmp_path / "moved")
    adapters.load_role(base, "sft", adapter)
    assert len(base.notes) == 1 and "has the same weights, so it is used" in base.notes[0]
    assert str(model) in base.notes[0] and str(tmp_path / "moved") in base.notes[0]


def test_a_base_of_other_weights_is_refused_and_never_merged(
    fine_tuned: Path, model: Path, adapter: Path, tmp_path: Path, load: Callable[..., SharedBase]
) -> None:
    base = load(fine_tuned)
    with pytest.raises(UserError, match="made for another base") as error:
        adapters.load_role(base, "sft", adapter)
    assert "\n" not in str(error.value) and str(model) in str(error.value) and base.roles == []
    shutil.rmtree(model)
    fine_tuned.rename(model)
    with pytest.raises(UserError, match="made for another base"):
        merge(str(adapter), str(tmp_path / "merged"))


def test_another_name_alone_is_said(model: Path, adapter: Path, load: Callable[..., SharedBase]) -> None:
    """Adapters written by PEFT have only the name of the base."""
    named(adapter, "meta/llama")
    base = load(model)
    adapters.load_role(base, "sft", adapter)
    (adapter / identity.FILE).unlink()
    adapters.load_role(base, "second", adapter)
    assert ["same weights" in note for note in base.notes] == [True, False]
    assert "made on meta/llama" in base.notes[1] and "nothing shows that the two are the same" in base.notes[1]
    named(adapter, None)
    adapters.load_role(base, "third", adapter)
    assert len(base.notes) == 2


def test_an_adapter_of_plain_peft_on_the_same_folder_is_taken_without_a_word(
    model: Path, tmp_path: Path, load: Callable[..., SharedBase]
) -> None:
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path / "plain")
    base = load(model)
    adapters.load_role(base, "sft", tmp_path / "plain")
    assert base.notes == []


def test_float16_is_compared_with_float16_alone(
    model: Path, fine_tuned: Path, adapter: Path, load: Callable[..., SharedBase]
) -> None:
    """It cannot hold what the others do, so its digest differs where the weights are the same."""
    base = load(model, dtype="float16")
    adapters.load_role(base, "sft", adapter)
    adapters.save_role(base, "sft", adapter)
    adapters.load_role(load(model, dtype="float16"), "sft", adapter)
    with pytest.raises(UserError, match="made for another base"):
        adapters.load_role(load(fine_tuned, dtype="float16"), "sft", adapter)


def test_a_folder_is_the_same_bytes_each_time(
    model: Path, adapter: Path, tmp_path: Path, load: Callable[..., SharedBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((adapter / adapters.CONFIG).read_text())
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 7
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = load(model)
    adapters.load_role(base, "sft", adapter)
    adapters.save_role(base, "sft", tmp_path / "again")
    base.tokenizer.save_pretrained(tmp_path / "again")
    for path in adapter.iterdir():
        if path.name != "tokenizer_config.json":
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    assert "local_files_only" not in (tmp_path / "again" / "tokenizer_config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == 1
