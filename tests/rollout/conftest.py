"""Fixtures: a shared base on the built-in tiny model, sharpened so that its choices differ, and prompts."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_fast.config import StageConfig
from rlhf_fast.data import PromptRow
from rlhf_fast.models import SharedBase, builtin, load_pretrained

sys.path.append(str(Path(__file__).parents[1] / "models"))  # tiny_models.py


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        return builtin.tiny_model()


@pytest.fixture
def base(folder: Path) -> SharedBase:
    """PAD 0, EOS 1, 258 real tokens of 320 rows; its bare base and its role ``policy`` give different logits."""
    config = StageConfig(model_name_or_path=str(folder), dtype="float32", lora_r=4)
    model, tokenizer = load_pretrained(config, torch.device("cpu"))
    model.lm_head.weight.mul_(20)
    shared = SharedBase(model, tokenizer, config)
    shared.add_role("policy")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in shared.named_parameters("policy").values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return shared


@pytest.fixture
def row() -> Callable[[list[int]], PromptRow]:
    return lambda ids: PromptRow(index=1, input_ids=ids, prompt="p", columns={}, prompt_key="p")
