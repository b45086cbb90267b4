"""Text decoders inside models that also read images: the decoder is trained, the rest is unchanged."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tiny_models import batch, randomise, settings
from transformers import AutoTokenizer, PreTrainedModel

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, adapters, load_pretrained
from rlhf_fast.models.merge import merge
from rlhf_fast.models.pretrained import auto_class

TEXT: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# As many layers as the text decoder has, and layers of the same names.
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 4, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
THREE_AXES = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}

WRAPPERS = {
    "gemma3": lambda: transformers.Gemma3Config(text_config={**TEXT, "sliding_window": 5}, vision_config=VISION),
    "llava": lambda: transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**VISION, "model_type": "clip_vision_model"}
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"}, vision_config={**VISION, "model_type": "pixtral"}
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(text_config={**TEXT, **THREE_AXES}, vision_config=QWEN_VISION),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(text_config={**TEXT, **THREE_AXES}, vision_config=QWEN_VISION),
}


class Loaded(NamedTuple):
    base: SharedBase
    folder: Path


@pytest.fixture(scope="module", params=list(WRAPPERS))
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Loaded]:
    folder = tmp_path_factory.mktemp(request.param)
    config = WRAPPERS[request.param]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder / "model")
    stage = settings(model_name_or_path=str(folder / "model"), lora_layers=2)
    base = SharedBase(*load_pretrained(stage, torch.device("cpu")), stage)
    base.add_role("policy")
    randomise(base, "policy", 0)
    yield Loaded(base, folder)


@torch.no_grad()
def own_logits(base: SharedBase, role: str | None, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with base.role(role):
        return base.model(input_ids=input_ids, attention_mask=mask).logits


def test_the_upper_text_layers_alone_are_adapted(loaded: Loaded) -> None:
    layers = {re.split(r"(?<=\d)\.", name)[0] for name in loaded.base.named_parameters("policy")}
    assert layers == {"model.language_model.layers.2", "model.language_model.layers.3"}
    assert {p.shape[-1] for n, p in loaded.base.named_parameters("policy").items() if "q_proj.lora_A" in n} == {32}
    assert loaded.base.notes == []
    loaded.base.add_role("second")
    assert loaded.base.named_parameters("second").keys() == loaded.base.named_parameters("policy").keys()


def test_hidden_states_give_the_models_own_logits_whatever_the_padding(loaded: Loaded) -> None:
    base, head = loaded.base, loaded.base.vocabulary
    input_ids, mask = batch([7, 4], "left")
    trunk = base.trunk(input_ids, mask)
    assert trunk is not None
    with torch.no_grad():
        hidden = base.hidden("policy", input_ids, mask, trunk)
        assert torch.equal(hidden, base.hidden("policy", input_ids, mask))
    for row, live in enumerate(mask.bool()):
        ids = input_ids[row, live][None]
        expected = own_logits(base, "policy", ids, torch.ones_like(ids))[0]
        logits = torch.nn.functional.linear(hidden[row, live], head.weight, head.bias)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert not torch.allclose(own_logits(base, None, ids, torch.ones_like(ids))[0], expected, atol=1e-2)


def test_the_merged_wrapper_gives_the_same_logits(loaded: Loaded) -> None:
    base, folder = loaded
    adapters.save_role(base, "policy", folder / "policy")
    base.tokenizer.save_pretrained(folder / "policy")
    target = merge(str(folder / "policy"), str(folder / "merged"))
    merged = auto_class(transformers.AutoConfig.from_pretrained(target)).from_pretrained(target)
    input_ids, mask = batch([6, 6], "right")
    with torch.no_grad():
        found = merged(input_ids=input_ids, attention_mask=mask).logits
    torch.testing.assert_close(found, own_logits(base, "policy", input_ids, mask), rtol=0, atol=1e-3)
    assert type(merged) is type(base.model)


def test_a_reward_model_merges_or_is_refused_by_a_line(loaded: Loaded) -> None:
    base, folder = loaded
    if "reward" not in base.roles:
        base.add_role("reward", head=True)
    adapters.save_role(base, "reward", folder / "reward")
    base.tokenizer.save_pretrained(folder / "reward")
    try:
        target = merge(str(folder / "reward"), str(folder / "merged_reward"))
    except UserError as error:
        assert "transformers has no AutoModelForSequenceClassification" in str(error) and "\n" not in str(error)
        return
    model = transformers.AutoModelForSequenceClassification.from_pretrained(target)
    input_ids, mask = batch([6, 6], "right")
    with torch.no_grad():
        raw = model(input_ids=input_ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(raw, base.scores("reward", input_ids, mask), rtol=0, atol=1e-3)
