"""Fixtures: the tiny tokenizer, and shared bases with four roles that all differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MakeBase, randomise, settings, tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_fast.models import SharedBase, builtin


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in tiny model, whose byte-level tokenizer (258 tokens, PAD 0, EOS 1) every test model shares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        return builtin.tiny_model()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def bare_base(tokenizer: PreTrainedTokenizerFast) -> MakeBase:
    """A base without roles: ``bare_base(architecture, dtype, **settings)``."""

    def make(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> SharedBase:
        return SharedBase(tiny_model(architecture).to(dtype), tokenizer, settings(**changes))

    return make


@pytest.fixture
def full_base(bare_base: MakeBase) -> MakeBase:
    """The same with the roles of PPO: sft and reward frozen, policy and critic trainable, all different."""

    def make(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> SharedBase:
        base = bare_base(architecture, dtype, **changes)
        roles = {"sft": (False, False), "reward": (True, False), "policy": (False, True), "critic": (True, True)}
        for seed, (role, (head, trainable)) in enumerate(roles.items()):
            base.add_role(role, head=head, trainable=trainable)
            randomise(base, role, seed)
        return base

    return make
