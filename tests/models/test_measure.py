"""Checks at load: padding, causality, the layers; each failure is one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_model, settings, tiny_model
from transformers import PreTrainedTokenizerFast

from rlhf_fast.data import PromptRow
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase
from rlhf_fast.rollout import generate


def refused(model: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    with pytest.raises(UserError) as error:
        SharedBase(model, tokenizer, settings()).add_role("policy")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("rwkv", {"attention_hidden_size": 32}, "RwkvForCausalLM: its states run through padding"),
        ("xlstm", {"num_blocks": 4, "num_heads": 4}, "xLSTMForCausalLM: its states run through padding"),
        ("bert", {}, "BertLMHeadModel: expected one list of 4 decoder layers beside the token embedding, found 0"),
    ],
)
def test_models_that_cannot_be_trained_right_are_refused_by_a_line(
    tokenizer: PreTrainedTokenizerFast,
    architecture: str,
    changes: dict[str, int],
    expected: str,
    dtype: torch.dtype,
) -> None:
    message = refused(tiny_model(architecture, **changes).to(dtype), tokenizer)
    assert all(part in message for part in expected.split(".*"))


@pytest.mark.parametrize("architecture", ["mamba", "falcon_mamba"])
def test_state_space_models_that_peft_or_the_dtype_cannot_do_are_refused_by_a_line(
    tokenizer: PreTrainedTokenizerFast, architecture: str
) -> None:
    model = tiny_model(architecture, state_size=4)
    assert "PEFT cannot adapt this model: " in (message := refused(model, tokenizer)) and "out_proj" in message
    assert "cannot compute in torch.bfloat16 on the cpu: " in refused(model.bfloat16(), tokenizer)


def test_a_model_whose_tokens_see_later_ones_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    layer = model.model.layers[1]
    inner = layer.mlp.forward
    layer.mlp.forward = lambda x: inner(x) + x.mean(dim=1, keepdim=True)
    assert "its tokens see the ones after them" in refused(model, tokenizer)


def test_a_model_that_ignores_the_mask_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    inner = model.model.forward
    model.model.forward = lambda attention_mask=None, position_ids=None, **rest: inner(**rest)
    assert "its states run through padding" in refused(model, tokenizer)


def test_a_model_that_samples_from_other_logits_than_it_trains_on_is_refused_when_it_samples(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Dory's loops use other keys when there is a cache. SFT may train it, since it never samples."""
    loops = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}
    base = SharedBase(tiny_model("dory", **loops), tokenizer, settings())
    base.add_role("policy")
    with pytest.raises(UserError, match="DoryForCausalLM cannot be sampled as it is trained .*: only SFT works"):
        generate(base, None, [PromptRow(1, [5, 6], "", {}, "")], response_length=2, temperature=1.0, batch_size=1)
    SharedBase(tiny_model("llama"), tokenizer, settings()).check_sampling()


def test_a_model_that_generates_from_wrong_positions_is_refused_when_it_samples(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model("gpt2")
    inner = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: inner(*args, **kwargs) | {"position_ids": None}
    with pytest.raises(UserError, match="its logits with a cache differ"):
        SharedBase(model, tokenizer, settings()).check_sampling()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba", "bamba", "lfm2"])
def test_mixtures_and_hybrids_are_taken_in_bfloat16(tokenizer: PreTrainedTokenizerFast, architecture: str) -> None:
    """In half precision a router may choose other experts for a token in another batch; this is not an error."""
    base = SharedBase(tiny_model(architecture).bfloat16(), tokenizer, settings(lora_layers=2))
    base.add_role("policy")
    assert base.first_adapted_layer == 2


def test_the_command_line_says_it_in_one_line_and_ends_with_2(
    command: Callable[..., Any], tmp_path: Path, tokenizer_folder: Path
) -> None:
    folder = save_model(tmp_path / "rwkv", tokenizer_folder, "rwkv", attention_hidden_size=32)
    outcome = command("sft", f"--model_name_or_path {folder} --output_dir out")
    assert outcome.code == 2 and "its states run through padding" in outcome.err
    assert "Traceback" not in outcome.err
