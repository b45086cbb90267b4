"""Roles on disk: bitwise round trips, PEFT's own readers and writers, and every kind of invalid folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import MakeBase, batch, randomise, save_model, settings
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, adapters, identity, load_pretrained

PEFT_CHECKED = ["llama", "gpt2", "gpt_neox", "gemma2"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def make(architecture: str) -> Path:
        folder = root / architecture
        return folder if folder.is_dir() else save_model(folder, tokenizer_folder, architecture)

    return make


@pytest.fixture
def loaded(model_folder: Callable[[str], Path]) -> Callable[..., SharedBase]:
    """A base loaded from a folder on disk, so that adapters can name it."""

    def make(architecture: str = "llama", **changes: Any) -> SharedBase:
        config = settings(model_name_or_path=str(model_folder(architecture)), **changes)
        return SharedBase(*load_pretrained(config, torch.device("cpu")), config)

    return make


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_layers", [None, 2])
def test_what_is_saved_comes_back_bitwise(full_base: MakeBase, tmp_path: Path, lora_layers: int | None) -> None:
    base = full_base(lora_layers=lora_layers)
    base.heads["reward"].calibrate(0.1, 3.3)
    adapters.save_role(base, "reward", tmp_path / "reward")
    adapters.save_role(base, "policy", tmp_path / "policy")

    other = full_base(lora_layers=lora_layers)  # roles of the same names must not interfere
    adapters.load_role(other, "back", tmp_path / "reward", want_head=True)
    adapters.load_role(other, "second", tmp_path / "policy")
    for role, copy in (("reward", "back"), ("policy", "second")):
        original, read = base.named_parameters(role), other.named_parameters(copy)
        assert original.keys() == read.keys()
        assert all(torch.equal(read[name], original[name]) for name in original)
        assert not any(parameter.requires_grad for parameter in read.values())
    assert "second" not in other.heads
    input_ids, mask = batch([6, 3], "right")
    assert torch.equal(other.scores("back", input_ids, mask), base.scores("reward", input_ids, mask))


def test_a_reward_model_is_refused_where_a_policy_is_expected(full_base: MakeBase, tmp_path: Path) -> None:
    base = full_base()
    adapters.save_role(base, "reward", tmp_path)
    with pytest.raises(UserError) as error:
        adapters.load_role(base, "start", tmp_path)
    assert "score head" in one_line(error) and "start" not in base.roles


def test_given_tensors_are_written_in_place_of_the_live_ones(full_base: MakeBase, tmp_path: Path) -> None:
    base = full_base()
    kept = {name: torch.full_like(p, 0.5) for name, p in base.named_parameters("policy").items()}
    adapters.save_role(base, "policy", tmp_path, parameters=kept)
    assert {v for tensor in load_file(tmp_path / adapters.WEIGHTS).values() for v in tensor.unique().tolist()} == {0.5}


def test_saving_changes_neither_the_role_nor_its_config(full_base: MakeBase, tmp_path: Path) -> None:
    base = full_base()
    before = base.peft.peft_config["reward"].to_dict()
    adapters.save_role(base, "reward", tmp_path)
    assert base.peft.peft_config["reward"].to_dict() == before
    names = {path.name for path in tmp_path.iterdir()} - {"README.md"}
    assert names == {adapters.CONFIG, adapters.WEIGHTS, adapters.CALIBRATION, identity.FILE}


# ---- PEFT and transformers read what we write ----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", PEFT_CHECKED)
def test_peft_reads_a_policy(loaded: Callable[..., SharedBase], tmp_path: Path, architecture: str) -> None:
    base = loaded(architecture, lora_layers=2)
    base.add_role("policy")
    randomise(base, "policy", 0)
    adapters.save_role(base, "policy", tmp_path)
    input_ids, mask = batch([7, 7], "right")
    with torch.no_grad(), base.role("policy"):
        expected = base.model(input_ids=input_ids, attention_mask=mask).logits
    plain = AutoModelForCausalLM.from_pretrained(base.model.name_or_path)
    peft = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(input_ids=input_ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", PEFT_CHECKED)
def test_peft_reads_a_reward_model(loaded: Callable[..., SharedBase], tmp_path: Path, architecture: str) -> None:
    base = loaded(architecture)
    base.add_role("reward", head=True)
    randomise(base, "reward", 0)
    base.heads["reward"].calibrate(0.25, 1.5)
    adapters.save_role(base, "reward", tmp_path)
    input_ids, mask = batch([7, 3, 5], "right")
    with torch.no_grad():
        expected = base.scores("reward", input_ids, mask) * 1.5 + 0.25

    auto = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path), num_labels=1).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(base.model.name_or_path, num_labels=1)
    for model in (auto, PeftModel.from_pretrained(plain, str(tmp_path)).eval()):
        with torch.no_grad():
            raw = model(input_ids=input_ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(raw, expected, rtol=0, atol=1e-5)


def test_the_config_on_disk_names_base_and_task(loaded: Callable[..., SharedBase], tmp_path: Path) -> None:
    base = loaded()
    base.add_role("policy")
    base.add_role("reward", head=True)
    for role, task, saved in (("policy", "CAUSAL_LM", None), ("reward", "SEQ_CLS", ["score"])):
        adapters.save_role(base, role, tmp_path / role)
        config = json.loads((tmp_path / role / adapters.CONFIG).read_text())
        assert (config["task_type"], config["modules_to_save"]) == (task, saved)
        assert Path(config["base_model_name_or_path"]).is_absolute()
        assert config["inference_mode"] is True


# ---- adapters of plain PEFT ----------------------------------------------------------------------------------------


def plain_peft(base: SharedBase, folder: Path, **lora: Any) -> PeftModel:
    """An adapter that PEFT alone made and saved, with values of its own."""
    model = AutoModelForCausalLM.from_pretrained(base.model.name_or_path)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, **lora)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_plain_peft_loads(loaded: Callable[..., SharedBase], tmp_path: Path, rslora: bool) -> None:
    base = loaded()
    model = plain_peft(base, tmp_path, target_modules=["q_proj", "up_proj"], use_rslora=rslora)
    input_ids, mask = batch([7, 7], "right")
    adapters.load_role(base, "sft", tmp_path)
    base.add_role("policy", copy_of="sft")
    for role in ("sft", "policy"):
        with torch.no_grad(), base.role(role):
            ours = base.model(input_ids=input_ids, attention_mask=mask).logits
            torch.testing.assert_close(ours, model(input_ids=input_ids, attention_mask=mask).logits, rtol=0, atol=1e-5)
    assert all(parameter.requires_grad for parameter in base.named_parameters("policy").values())


@pytest.mark.parametrize(
    ("lora", "tensor"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
    ],
)
def test_adapters_that_the_fused_losses_or_the_other_roles_would_not_see_are_refused(
    loaded: Callable[..., SharedBase], tmp_path: Path, lora: dict[str, Any], tensor: str
) -> None:
    base = loaded()
    plain_peft(base, tmp_path, **lora)
    with pytest.raises(UserError) as error:
        adapters.load_role(base, "sft", tmp_path)
    assert tensor in one_line(error) and "LoRA" in str(error.value)


def test_an_adapter_with_trained_biases_is_refused(loaded: Callable[..., SharedBase], tmp_path: Path) -> None:
    """They would be written into the base, which every role shares."""
    base = loaded("gpt2")
    plain_peft(base, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")
    before = base.model.transformer.h[0].attn.c_attn.bias.clone()
    with pytest.raises(UserError, match="bias"):
        adapters.load_role(base, "sft", tmp_path)
    assert torch.equal(base.model.transformer.h[0].attn.c_attn.bias, before)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "loftq", "orthogonal", "eva", "gaussian", False])
def test_the_base_is_the_same_whatever_initialised_an_adapter(
    loaded: Callable[..., SharedBase], tmp_path: Path, kind: Any
) -> None:
    """PEFT writes another base for some when it makes the adapter, before the adapter's tensors are read."""
    plain_peft(loaded(), tmp_path, target_modules=["q_proj"])
    change_config(tmp_path, init_lora_weights=kind, r=3)
    base, folder = loaded(), tmp_path
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    if kind in adapters.OVER_THE_SAME_BASE:
        adapters.load_role(base, "sft", folder)
        base.add_role("policy", copy_of="sft")
    else:
        with pytest.raises(UserError) as error:
            adapters.load_role(base, "sft", folder)
        assert f"init_lora_weights is {kind!r}" in one_line(error)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in base.model.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_base_that_peft_changes_is_noticed(loaded: Callable[..., SharedBase]) -> None:
    base = loaded()
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="PEFT changes the base"):
        base.load_role("sft", lora, {})


# ---- folders that are wrong ----------------------------------------------------------------------------------------


@pytest.fixture
def reward_folder(bare_base: MakeBase, tmp_path: Path) -> Path:
    folder, base = tmp_path / "reward", bare_base()
    base.add_role("reward", head=True)
    randomise(base, "reward", 0)
    adapters.save_role(base, "reward", folder)
    return folder


def damage_weights(folder: Path) -> None:
    weights = folder / adapters.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])


def other_kind(folder: Path) -> None:
    (folder / adapters.CONFIG).write_text(json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM"}))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(folder: Path) -> None:
    state = load_file(folder / adapters.WEIGHTS)
    state.pop(next(name for name in state if "lora_A" in name))
    save_file(state, folder / adapters.WEIGHTS)


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / adapters.CONFIG).unlink(), "adapter_config.json is missing"),
    (lambda folder: (folder / adapters.WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    (damage_weights, "cannot be read"),
    (lambda folder: (folder / adapters.CONFIG).write_text("{"), "cannot be read"),
    (lambda folder: (folder / adapters.CONFIG).write_text("[]"), "cannot be read"),
    (lambda folder: (folder / adapters.CONFIG).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    (lambda folder: (folder / adapters.CALIBRATION).write_text("{"), "calibration.json"),
    (lambda folder: (folder / adapters.CALIBRATION).write_text('{"mean": 0}'), "calibration.json"),
    (lambda folder: (folder / adapters.CALIBRATION).write_text('{"mean": 0, "std": 0}'), "calibration.json"),
    (other_kind, "LoRA adapter"),
    (lambda folder: change_config(folder, lora_alpha="x"), "lora_alpha must be a finite number from 0 on; got 'x'"),
    (lambda folder: change_config(folder, lora_alpha=float("inf")), "lora_alpha must be a finite number"),
    (lambda folder: change_config(folder, r="four"), "r must be a whole number from 1 on; got 'four'"),
    (lambda folder: change_config(folder, r=4.5), "r must be a whole number from 1 on; got 4.5"),
    (lambda folder: change_config(folder, r=0), "r must be a whole number from 1 on; got 0"),
    (lambda folder: change_config(folder, target_modules=5), "PEFT cannot use its adapter_config.json"),
    (lambda folder: change_config(folder, target_modules="q_proj["), "PEFT cannot use its adapter_config.json"),
    (lambda folder: change_config(folder, rank_pattern="x"), "PEFT cannot use its adapter_config.json"),
    (lambda folder: change_config(folder, layers_to_transform="x"), "PEFT cannot use its adapter_config.json"),
    (lambda folder: change_config(folder, layers_to_transform=[99]), "its config is not the one"),
    (lambda folder: change_config(folder, use_dora=True), "its config is not the one it was trained with"),
    (lambda folder: change_config(folder, rank_pattern={"q_proj": 2}), "its config is not the one it was trained with"),
    (lambda folder: drop_tensor(folder), "damaged, or its config"),
    (lambda folder: change_config(folder, init_lora_weights="olora"), "init_lora_weights is 'olora'"),
    (lambda folder: change_config(folder, lora_dropout=None), "lora_dropout must be a finite number"),
    (lambda folder: change_config(folder, target_modules=[]), "target_modules names no module"),
    (lambda folder: (folder / identity.FILE).write_text("{"), "base_model.json is damaged"),
    (lambda folder: (folder / identity.FILE).write_text("[]"), "base_model.json is damaged"),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGE)
def test_a_damaged_folder_is_an_error_of_one_line(
    bare_base: MakeBase, reward_folder: Path, damage: Callable[[Path], Any], expected: str
) -> None:
    damage(reward_folder)
    with pytest.raises(UserError) as error:
        adapters.load_role(bare_base(), "back", reward_folder, want_head=True)
    assert expected in one_line(error) and str(reward_folder) in str(error.value)


def test_a_missing_folder_or_head_is_named(full_base: MakeBase, tmp_path: Path) -> None:
    base = full_base()
    with pytest.raises(UserError, match=f"no adapter folder {tmp_path / 'none'}"):
        adapters.load_role(base, "back", tmp_path / "none")
    adapters.save_role(base, "policy", tmp_path)
    with pytest.raises(UserError, match="no score head in adapter_model.safetensors"):
        adapters.load_role(base, "back", tmp_path, want_head=True)


def test_a_reward_model_without_calibration_keeps_its_raw_scores(bare_base: MakeBase, reward_folder: Path) -> None:
    (reward_folder / adapters.CALIBRATION).unlink()
    base = bare_base()
    adapters.load_role(base, "back", reward_folder, want_head=True)
    assert (base.heads["back"].mean.item(), base.heads["back"].std.item()) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"hidden_size": 64}),
        ("llama", {"num_hidden_layers": 6}),
        ("llama", {"num_hidden_layers": 2}),
        ("gpt2", {}),
    ],
)
@pytest.mark.parametrize("others", [False, True])
def test_an_adapter_of_another_base_is_refused(
    loaded: Callable[..., SharedBase],
    reward_folder: Path,
    tmp_path: Path,
    tokenizer_folder: Path,
    architecture: str,
    changes: dict[str, int],
    others: bool,
) -> None:
    folder = save_model(tmp_path / "model", tokenizer_folder, architecture, **changes)
    config = settings(model_name_or_path=str(folder))
    base = SharedBase(*load_pretrained(config, torch.device("cpu")), config)
    if others:
        base.add_role("first")
    with pytest.raises(UserError) as error:
        adapters.load_role(base, "back", reward_folder, want_head=True)
    assert "made for another base" in one_line(error)


def test_a_classifier_of_two_labels_is_no_reward_model(bare_base: MakeBase, reward_folder: Path) -> None:
    state = load_file(reward_folder / adapters.WEIGHTS)
    name = next(name for name in state if name.endswith("score.weight"))
    save_file(state | {name: torch.zeros(2, 32)}, reward_folder / adapters.WEIGHTS)
    with pytest.raises(UserError, match="expected a score head of one label; got 2"):
        adapters.load_role(bare_base(), "back", reward_folder, want_head=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bare_base: MakeBase, reward_folder: Path, value: float) -> None:
    for part in ("lora_B.weight", "score.weight"):
        state = load_file(reward_folder / adapters.WEIGHTS)
        name = next(name for name in state if name.endswith(part))
        kept = state[name].clone()
        state[name].view(-1)[3] = value
        save_file(state, reward_folder / adapters.WEIGHTS)
        with pytest.raises(UserError) as error:
            adapters.load_role(bare_base(), "back", reward_folder, want_head=True)
        assert str(reward_folder) in one_line(error) and name in str(error.value)
        save_file(state | {name: kept}, reward_folder / adapters.WEIGHTS)


def test_a_missing_tensor_is_named(full_base: MakeBase, tmp_path: Path) -> None:
    base = full_base()
    adapters.save_role(base, "policy", tmp_path)
    state = load_file(tmp_path / adapters.WEIGHTS)
    name = sorted(state)[3]
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / adapters.WEIGHTS)
    with pytest.raises(UserError, match="1 tensors are missing and 0 are unknown"):
        adapters.load_role(base, "back", tmp_path)
