"""Adapters on the token embedding, against transformers and PEFT alone: states, gradients, files, merging, a run."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import MakeBase, batch, randomise, save_model, settings, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, adapters, load_pretrained
from rlhf_fast.models.merge import merge

# Its head is the same weight (but gpt_neox's); gemma2 multiplies what it looks up; gpt2 also embeds positions.
NAMES = {"llama": "embed_tokens", "gemma2": "embed_tokens", "gpt2": "wte", "gpt_neox": "embed_in"}
TIED = {"llama": {"tie_word_embeddings": True}}
every_architecture = pytest.mark.parametrize("architecture", NAMES)


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast) -> Callable[..., SharedBase]:
    """The roles sft and policy with adapters on the embedding, and on the layers and the head."""

    def made(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> SharedBase:
        names = ["all-linear", "lm_head", NAMES[architecture]]
        stage = settings(**{"lora_target_modules": names, **changes})
        model = tiny_model(architecture, **TIED.get(architecture, {})).to(dtype)
        return with_roles(SharedBase(model, tokenizer, stage))

    return made


@pytest.fixture
def saved(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., SharedBase]:
    """A base with these roles, loaded from ``model/``."""

    def made(architecture: str, names: list[str], **changes: Any) -> SharedBase:
        changes = {**TIED.get(architecture, {}), "pad_token_id": None, **changes}
        folder = save_model(tmp_path / "model", tokenizer_folder, architecture, **changes)
        stage = settings(model_name_or_path=str(folder), lora_target_modules=names)
        return with_roles(SharedBase(*load_pretrained(stage, torch.device("cpu")), stage))

    return made


def with_roles(base: SharedBase) -> SharedBase:
    for seed, role in enumerate(("sft", "policy")):
        base.add_role(role)
        randomise(base, role, seed)
    return base


def logits_of(base: SharedBase, role: str | None, ids: Tensor) -> Tensor:
    with torch.no_grad(), base.role(role):
        return base.model(ids).logits


def upstream_of(mask: Tensor) -> Tensor:
    return torch.randn(*mask.shape, 32, generator=torch.Generator().manual_seed(5)) * mask[..., None]


def states_and_gradients(base: SharedBase, roles: list[str], ids: Tensor, mask: Tensor) -> tuple[list[Tensor], Any]:
    parameters = {(role, name): p for role in roles for name, p in base.named_parameters(role).items()}
    states = base.hidden_of(roles, ids, mask)
    sum((each * upstream_of(mask)).sum() for each in states).backward()
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return [each.detach()[mask.bool()] for each in states], found


@every_architecture
@pytest.mark.parametrize("lora_layers", [None, 2])
def test_roles_in_one_pass_are_pefts_own_in_float64(
    make: Callable[..., SharedBase], architecture: str, lora_layers: int | None
) -> None:
    base = make(architecture, lora_layers=lora_layers)
    ids, mask = batch([9, 3, 7], "left")
    assert base.one_pass and base.packs and base.first_adapted_layer == 0 and base.trunk(ids, mask) is None
    found, grads = states_and_gradients(base, ["policy", "sft"], ids, mask)
    for role, states in zip(("policy", "sft"), found, strict=True):
        plain = tiny_model(architecture, **TIED.get(architecture, {})).double()
        peft = get_peft_model(plain, copy.deepcopy(base.peft.peft_config[role]), autocast_adapter_dtype=False)
        own = {
            name.replace(".default", "").removeprefix(adapters.PREFIX): p
            for name, p in peft.named_parameters()
            if "lora_" in name
        }
        assert own.keys() == base.named_parameters(role).keys()
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(base.named_parameters(role)[name])
        body = peft.base_model.model.base_model
        rows = [
            body(input_ids=row[live.bool()][None]).last_hidden_state[0] for row, live in zip(ids, mask, strict=True)
        ]
        expected = torch.cat(rows)
        (expected * upstream_of(mask)[mask.bool()]).sum().backward()
        torch.testing.assert_close(states.double(), expected, rtol=1e-4, atol=1e-4)
        on_embedding = 0
        for name, parameter in own.items():
            if parameter.grad is not None:
                gap = (grads[role, name] - parameter.grad).norm() / parameter.grad.norm()
                assert gap < 1e-4, name
                on_embedding += "lora_embedding_" in name
        assert on_embedding == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
def test_roles_without_an_adapter_there_and_the_bare_base(make: Callable[..., SharedBase], dtype: torch.dtype) -> None:
    base = make(dtype=dtype)
    base.config.lora_target_modules = ["q_proj"]
    base.add_role("other")
    randomise(base, "other", 3)
    ids, mask = batch([9, 3, 7], "right")
    roles = ["policy", None, "other", "sft"]
    with torch.no_grad():
        together = base.hidden_of(roles, ids, mask)
        for role, states in zip(roles, together, strict=True):
            atol = 0.1 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(states, base.hidden(role, ids, mask), rtol=0, atol=atol)
    embedding = base.model.model.embed_tokens
    assert {p.dtype for p in base.named_parameters("policy").values()} == {torch.float32}
    with torch.no_grad(), base.role("policy"):
        lora = [embedding.lora_embedding_A["policy"], embedding.lora_embedding_B["policy"]]
        expected = (embedding.weight.float() + 2 * (lora[1] @ lora[0]).T)[ids].to(dtype)
        torch.testing.assert_close(embedding(ids), expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_an_adapter_there_alone(make: Callable[..., SharedBase]) -> None:
    """All layers are frozen, and the gradient passes through them; checkpointing changes no bit of it."""
    base = make(lora_target_modules=["embed_tokens"], lora_layers=1)
    assert {name.rpartition(".")[2] for name in base.named_parameters("policy")} == {
        "lora_embedding_A",
        "lora_embedding_B",
    }
    ids, mask = batch([6, 4], "left")
    assert base.one_pass and base.trunk(ids, mask) is None
    _, grads = states_and_gradients(base, ["policy", "sft"], ids, mask)
    assert len(grads) == 4 and all(grad.abs().max() > 0 for grad in grads.values())
    for role in ("policy", "sft"):
        on_a = grads[role, "model.embed_tokens.lora_embedding_A"]
        assert set(on_a.abs().sum(0).nonzero().flatten().tolist()) == set(ids[mask.bool()].tolist())
    base.config = dataclasses.replace(base.config, gradient_checkpointing=True)
    _, again = states_and_gradients(base, ["policy", "sft"], ids, mask)
    assert all(torch.equal(again[name], grad) for name, grad in grads.items())


def test_a_copy_is_bitwise_and_the_base_is_not_touched(make: Callable[..., SharedBase]) -> None:
    base = make()
    version, own = base.model.model.embed_tokens.weight._version, base.named_parameters("policy")
    base.add_role("second", copy_of="policy")
    twin = base.named_parameters("second")
    assert own.keys() == twin.keys() and all(torch.equal(twin[name], p) for name, p in own.items())
    assert base.model.model.embed_tokens.weight._version == version
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight


@every_architecture
def test_the_merged_copy_leaves_a_head_of_the_same_weight_alone(
    make: Callable[..., SharedBase], architecture: str
) -> None:
    base = make(architecture, lora_target_modules=["all-linear", NAMES[architecture]])
    ids = batch([7, 7], "left")[0]
    with base.role(None):  # whatever PEFT's active adapter is, here and below
        copied = base.merged("policy")
    with torch.no_grad(), copied.in_use(), base.role("sft"):
        found = base.model(ids).logits
    torch.testing.assert_close(found, logits_of(base, "policy", ids), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), base.merged(None).in_use():
        found = base.model(ids).logits
    torch.testing.assert_close(found, logits_of(base, None, ids), rtol=1e-5, atol=1e-5)


@every_architecture
@pytest.mark.parametrize("others", [[], ["lm_head"]], ids=("alone", "head"))
def test_what_is_saved_is_pefts_own_and_merges(
    saved: Callable[..., SharedBase], tmp_path: Path, architecture: str, others: list[str]
) -> None:
    base = saved(architecture, ["all-linear", NAMES[architecture], *others])
    adapters.save_role(base, "policy", tmp_path / "policy")
    base.tokenizer.save_pretrained(tmp_path / "policy")
    ids = batch([7, 7], "left")[0]
    expected = logits_of(base, "policy", ids)
    adapters.load_role(base, "again", tmp_path / "policy")
    assert torch.equal(logits_of(base, "again", ids), expected)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "policy")
    merged = AutoModelForCausalLM.from_pretrained(merge(str(tmp_path / "policy"), str(tmp_path / "merged")))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=5e-5)  # products in another order
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=2e-4)
    assert not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)


def test_a_merged_reward_model(saved: Callable[..., SharedBase], tmp_path: Path) -> None:
    base = saved("llama", ["all-linear", "embed_tokens"])
    base.add_role("reward", copy_of="policy", head=True)
    adapters.save_role(base, "reward", tmp_path / "reward")
    base.tokenizer.save_pretrained(tmp_path / "reward")
    ids, mask = batch([7, 4, 2], "right")
    model = AutoModelForSequenceClassification.from_pretrained(merge(str(tmp_path / "reward"), str(tmp_path / "out")))
    with torch.no_grad():
        raw = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(raw, base.scores("reward", ids, mask), rtol=0, atol=2e-4)


# ---- adapters of plain PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["q_proj", "embed_tokens"], ["q_proj", "embed_tokens", "lm_head"]], ids=len)
def test_pefts_files_hold_the_bases_weight_which_is_compared(
    saved: Callable[..., SharedBase], tmp_path: Path, names: list[str]
) -> None:
    base = saved("llama", ["q_proj"])
    ids = batch([7, 7], "left")[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    lora = LoraConfig(r=3, target_modules=names, use_rslora=True, init_lora_weights=False)
    peft = get_peft_model(model, lora).eval()
    peft.save_pretrained(str(tmp_path / "theirs"))
    base.tokenizer.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / adapters.WEIGHTS
    state = load_file(file)
    key = adapters.PREFIX + "model.embed_tokens.base_layer.weight"
    adapters.load_role(base, "theirs", tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(base, "theirs", ids), peft(ids).logits, rtol=1e-4, atol=1e-4)
    save_file({name: tensor for name, tensor in state.items() if not name.endswith("embedding_B")}, file)
    with pytest.raises(UserError, match=r"1 tensors are missing .*lora_embedding_B"):
        adapters.load_role(base, "damaged", tmp_path / "theirs")
    state[key][7] += 1  # a row that was trained, as for a new token
    save_file(state, file)
    for use in (
        lambda: adapters.load_role(base, "changed", tmp_path / "theirs"),
        lambda: merge(str(tmp_path / "theirs"), str(tmp_path / "merged")),
    ):
        with pytest.raises(UserError, match=r"embed_tokens.base_layer.weight in it is not the weight of this base"):
            use()


def test_tied_adapters_are_refused(saved: Callable[..., SharedBase], tmp_path: Path) -> None:
    base = saved("llama", ["q_proj"])
    lora = LoraConfig(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), lora).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"ties the adapters .*ensure_weight_tying"):
        adapters.load_role(base, "theirs", tmp_path / "theirs")


def test_only_an_embedding_that_looks_up_rows_can_be_named(bare_base: MakeBase) -> None:
    with pytest.raises(UserError, match="no linear module 'embed_token' .*did you mean 'embed_tokens'"):
        bare_base(lora_target_modules=["embed_token"]).add_role("policy")
    with pytest.raises(UserError, match="no linear module 'wpe'"):
        bare_base("gpt2", lora_target_modules=["wpe"]).add_role("policy")
    base = bare_base(lora_target_modules=["embed_tokens"])
    normed = type("NormedEmbedding", (torch.nn.Embedding,), {})
    base.model.get_input_embeddings().__class__ = normed
    with pytest.raises(UserError, match="no linear module 'embed_tokens'"):
        base.add_role("policy")
