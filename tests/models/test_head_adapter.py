"""Adapters on the language-model head: log-probs, gradients, sampling, saving and merging."""

from pathlib import Path

import pytest
import torch
from tiny_models import MakeBase, randomise, save_model, settings
from transformers import AutoModelForCausalLM

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, adapters, load_pretrained
from rlhf_fast.models.merge import merge
from rlhf_fast.ops import linear_logprobs

IDS = torch.arange(2, 26).view(2, 12)
MASK = torch.ones_like(IDS)
NAMES = {"lora_target_modules": ["all-linear", "lm_head"]}


def with_policy(base: SharedBase) -> SharedBase:
    base.add_role("policy")
    randomise(base, "policy", 0)
    return base


def logprobs(base: SharedBase, role: str | None) -> torch.Tensor:
    vocabulary = base.vocabulary_of(role)
    states = base.hidden(role, IDS, MASK)[:, :-1]
    return linear_logprobs(states, vocabulary.weight, IDS[:, 1:], vocab_size=base.vocab_size, **vocabulary.options())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("lora_layers", [None, 2])
def test_logprobs_and_gradients_are_those_of_pefts_model(
    bare_base: MakeBase, architecture: str, lora_layers: int | None
) -> None:
    base = with_policy(bare_base(architecture, **NAMES, lora_layers=lora_layers))
    parameters = base.named_parameters("policy")
    on_head = [name for name in parameters if name.startswith("lm_head.")]
    assert len(on_head) == 2
    assert len({name.split(".")[-5] for name in parameters if name not in on_head}) <= (lora_layers or 4) * 7
    found = logprobs(base, "policy")
    grads = torch.autograd.grad(found.sum(), list(parameters.values()))
    with base.role("policy"):
        logits = base.model(IDS).logits[:, :-1, : base.vocab_size].float()
    expected = logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        grads, torch.autograd.grad(expected.sum(), list(parameters.values())), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(found, logprobs(base, None))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # gemma2's head is its token embedding
def test_it_is_saved_loaded_and_merged(tmp_path: Path, tokenizer_folder: Path, architecture: str) -> None:
    folder = save_model(tmp_path / "model", tokenizer_folder, architecture, pad_token_id=None)
    stage = settings(model_name_or_path=str(folder), **NAMES)
    base = with_policy(SharedBase(*load_pretrained(stage, torch.device("cpu")), stage))
    with base.role("policy"):
        expected = base.model(IDS).logits
    adapters.save_role(base, "policy", tmp_path / "policy")
    base.tokenizer.save_pretrained(tmp_path / "policy")
    adapters.load_role(base, "again", tmp_path / "policy")
    with base.role("again"):
        assert torch.equal(base.model(IDS).logits, expected)
    merged = AutoModelForCausalLM.from_pretrained(merge(str(tmp_path / "policy"), str(tmp_path / "merged")))
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_all_linear_leaves_the_head_alone(bare_base: MakeBase) -> None:
    base = with_policy(bare_base())
    assert not any(name.startswith("lm_head") for name in base.named_parameters("policy"))
    with pytest.raises(UserError, match="no linear module 'lm_heads' .*did you mean.*lm_head"):
        bare_base(lora_target_modules=["lm_heads"]).add_role("policy")
