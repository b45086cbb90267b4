"""Fixtures: the tiny tokenizer, a separate cache, rows from dicts."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from tiny_tokenizer import CHAT_TEMPLATE, SPECIAL, build_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """EOS is <|im_end|> and so is PAD, as SmolLM2 ships it; no BOS is written before text."""
    built = build_tokenizer(SPECIAL, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    built.chat_template = CHAT_TEMPLATE
    return built


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Writes BOS before and EOS after each text, and has no chat template."""
    built = build_tokenizer(SPECIAL, bos_token="<s>", eos_token="<|endoftext|>")
    ids = [("<s>", built.convert_tokens_to_ids("<s>")), ("<|endoftext|>", built.eos_token_id)]
    built.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=ids
    )
    return built


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tests neither read nor write the user's cache."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", cache / "extracted")
    return cache


@pytest.fixture
def rows_of() -> Callable[..., datasets.Dataset]:
    return lambda *rows: datasets.Dataset.from_list(list(rows))
