"""A tiny random model and a tokenizer, and errors against float64. `make test-peers` runs this folder."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from tiny_tokenizer import MARKED_TEMPLATE, SPECIAL, build_tokenizer  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    built = build_tokenizer(SPECIAL, eos_token="<|endoftext|>", pad_token="<|repo|>")
    built.chat_template = MARKED_TEMPLATE
    return built


def llama(tokenizer: PreTrainedTokenizerFast, labels: int = 0, **changes: Any) -> Any:
    """A causal model, or with ``labels`` a classifier; the same weights every time."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 288,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = LlamaConfig(**settings | changes, **({"num_labels": labels} if labels else {}))
    return LlamaForSequenceClassification(config) if labels else LlamaForCausalLM(config)


def distance(found: Tensor, true: Tensor) -> float:
    """The largest difference, relative to the largest element of the truth."""
    return float((found.double() - true).abs().max() / true.abs().max().clamp(min=1e-30))


def no_further(ours: Tensor, theirs: Tensor, true: Tensor, name: str, rounding: float = 1e-6) -> None:
    """Ours is as near to float64 as theirs, up to ``rounding``: by default a few roundings of float32."""
    assert distance(ours, true) <= 1.2 * distance(theirs, true) + rounding, name


def imported(name: str) -> Any:
    """The module, with a stand-in for each package that it lacks; other tests do not see the stand-ins."""
    missing: list[str] = []
    while True:
        try:
            module = importlib.import_module(name)
            break
        except ModuleNotFoundError as error:
            assert error.name is not None and error.name.split(".")[0] != name.split(".")[0]
            missing.append(error.name)
            stand_in = ModuleType(error.name)
            stand_in.__path__ = []
            stand_in.__getattr__ = lambda name: MagicMock()  # type: ignore[method-assign]
            sys.modules[error.name] = stand_in
    for package in missing:
        del sys.modules[package]
    return module
