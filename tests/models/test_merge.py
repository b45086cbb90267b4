"""Merged models: plain transformers loads them and computes what the adapter computed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import batch, randomise, save_model, settings
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, adapters, load_pretrained
from rlhf_fast.models.merge import merge

ARCHITECTURES = ["llama", "gpt2", "gemma2"]


@pytest.fixture
def trained(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., SharedBase]:
    """A base with an adapter in ``policy/`` and a reward model in ``reward/``, tokenizer beside each."""

    def make(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> SharedBase:
        folder = save_model(tmp_path / "model", tokenizer_folder, architecture, pad_token_id=None)
        if dtype != torch.float32:
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
        config = settings(model_name_or_path=str(folder))
        base = SharedBase(*load_pretrained(config, torch.device("cpu")), config)
        for role, head in (("policy", False), ("reward", True)):
            base.add_role(role, head=head)
            randomise(base, role, 0)
        base.heads["reward"].calibrate(0.25, 1.5)
        for role in ("policy", "reward"):
            adapters.save_role(base, role, tmp_path / role)
            base.tokenizer.save_pretrained(tmp_path / role)
        return base

    return make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_policy_gives_the_same_logits(
    trained: Callable[..., SharedBase], tmp_path: Path, architecture: str
) -> None:
    base = trained(architecture)
    input_ids, mask = batch([7, 4], "right")
    with torch.no_grad(), base.role("policy"):
        expected = base.model(input_ids=input_ids, attention_mask=mask).logits
    folder = merge(str(tmp_path / "policy"), str(tmp_path / "merged"))
    assert folder == tmp_path / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-4)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == model.config.pad_token_id == base.pad_id
    assert not list(folder.glob("adapter*")) and not list(folder.glob("*.bin"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_reward_model_gives_the_same_raw_scores(
    trained: Callable[..., SharedBase], tmp_path: Path, architecture: str
) -> None:
    base = trained(architecture)
    input_ids, mask = batch([7, 4, 2], "right")
    with torch.no_grad():
        expected = base.scores("reward", input_ids, mask) * 1.5 + 0.25
    model = AutoModelForSequenceClassification.from_pretrained(merge(str(tmp_path / "reward"), str(tmp_path / "out")))
    assert model.config.num_labels == 1
    assert (model.config.score_mean, model.config.score_std) == (0.25, 1.5)
    with torch.no_grad():
        raw = model(input_ids=input_ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(raw, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("dtype", "expected"), [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_the_merged_dtype_is_the_bases_unless_named(
    trained: Callable[..., SharedBase], tmp_path: Path, dtype: str | None, expected: str
) -> None:
    trained(dtype=torch.bfloat16)
    folder = merge(str(tmp_path / "policy"), str(tmp_path / "merged"), dtype)
    assert {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()} == {f"torch.{expected}"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == expected


def test_wrong_targets_are_refused_before_anything_is_written(
    trained: Callable[..., SharedBase], tmp_path: Path
) -> None:
    trained()
    policy, full, file = str(tmp_path / "policy"), tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    file.write_text("keep")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        merge(policy, str(full))
    with pytest.raises(UserError, match="is a file; name a folder"):
        merge(policy, str(file))
    with pytest.raises(UserError, match="--dtype must be one of float32, bfloat16, float16; got 'fp8'"):
        merge(policy, str(tmp_path / "merged"), "fp8")
    with pytest.raises(UserError, match="no adapter folder"):
        merge(str(tmp_path / "none"), str(tmp_path / "merged"))
    assert [path.name for path in full.iterdir()] == ["mine.txt"] and not (tmp_path / "merged").exists()


def test_a_base_that_is_gone_is_named(trained: Callable[..., SharedBase], tmp_path: Path) -> None:
    trained()
    (tmp_path / "model").rename(tmp_path / "modell")
    with pytest.raises(UserError, match=r"no model folder .*model \(did you mean 'modell'\?\)"):
        merge(str(tmp_path / "policy"), str(tmp_path / "merged"))


def test_an_adapter_without_a_tokenizer_is_an_error_of_one_line(
    trained: Callable[..., SharedBase], tmp_path: Path
) -> None:
    trained()
    for path in (tmp_path / "policy").iterdir():
        if not path.name.startswith("adapter"):
            path.unlink()
    with pytest.raises(UserError, match="no tokenizer in") as error:
        merge(str(tmp_path / "policy"), str(tmp_path / "merged"))
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(
    trained: Callable[..., SharedBase], tmp_path: Path
) -> None:
    trained()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the merged model") as error:
        merge(str(tmp_path / "policy"), str(tmp_path / "file" / "merged"))
    assert "\n" not in str(error.value)
