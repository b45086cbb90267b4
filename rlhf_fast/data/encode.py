"""Data sets to rows of token ids, within a longest length. What is dropped or truncated is counted in the report."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.conversation import ConversationEncoder
from rlhf_fast.data.formats import Text, preference_examples, prompt_examples, sft_examples
from rlhf_fast.data.report import DataReport

PROMPT_TOO_LONG = "the prompt fills the window"
SAME_TOKENS = "chosen and rejected are the same tokens within the window"


@dataclass(frozen=True, slots=True)
class SFTRow:
    """``response_mask``: 1 on the tokens to learn. ``index``: the row in its source, from 1. Rows with the same prompt
    have the same ``prompt_key``."""

    index: int
    input_ids: list[int]
    response_mask: list[int]
    prompt_key: str


@dataclass(frozen=True, slots=True)
class PairRow:
    """Prompt and response in each of ``chosen_ids`` and ``rejected_ids``; the response lengths are in tokens, EOS
    included. ``margin``: by how much chosen is better, where the data says so."""

    index: int
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_response_length: int
    rejected_response_length: int
    margin: float | None
    prompt_key: str


@dataclass(frozen=True, slots=True)
class PromptRow:
    """``input_ids`` end where the response begins. ``columns``: the source's other columns, for reward functions."""

    index: int
    input_ids: list[int]
    prompt: Text
    columns: dict[str, Any]
    prompt_key: str


def sft_rows(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, source: str
) -> tuple[list[SFTRow], DataReport]:
    """Rows for supervised fine-tuning, each of at most ``max_length`` tokens, cut on the right.

    A row in which no response token is left is dropped. ``source`` names the data set in errors and in the report.
    Raises UserError for wrong columns, a row of the wrong structure, or where no row is left.
    """
    _check_length(max_length)
    report, encoder = DataReport(source), ConversationEncoder(tokenizer, source)
    rows = []
    for example in sft_examples(dataset, report):
        encoded = encoder.response(example, example.responses[0])
        mask = encoded.response_mask[:max_length]
        if not any(mask):
            report.drop(PROMPT_TOO_LONG, example.index)
            continue
        report.truncated += len(encoded.input_ids) > max_length
        rows.append(SFTRow(example.index, encoded.input_ids[:max_length], mask, _prompt_key(example.prompt)))
    return rows, _finished(report, rows)


def preference_rows(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, source: str
) -> tuple[list[PairRow], DataReport]:
    """Pairs for the reward model, each side of at most ``max_length`` tokens, responses cut on the right.

    Pairs whose prompt alone fills the window, or whose sides are the same tokens once cut, are dropped and counted;
    a pair with a side that was cut counts once as truncated. Errors as in sft_rows.
    """
    _check_length(max_length)
    report, encoder = DataReport(source), ConversationEncoder(tokenizer, source)
    rows = []
    for example in preference_examples(dataset, report):
        chosen, rejected = (encoder.response(example, response) for response in example.responses)
        chosen_ids, rejected_ids = chosen.input_ids[:max_length], rejected.input_ids[:max_length]
        if chosen.prompt_length >= max_length:
            report.drop(PROMPT_TOO_LONG, example.index)
            continue
        if chosen_ids == rejected_ids:
            report.drop(SAME_TOKENS, example.index)
            continue
        report.truncated += max(len(chosen.input_ids), len(rejected.input_ids)) > max_length
        margin = example.columns["margin"]
        rows.append(
            PairRow(
                index=example.index,
                chosen_ids=chosen_ids,
                rejected_ids=rejected_ids,
                chosen_response_length=len(chosen_ids) - chosen.prompt_length,
                rejected_response_length=len(rejected_ids) - rejected.prompt_length,
                margin=None if margin is None else float(margin),
                prompt_key=_prompt_key(example.prompt),
            )
        )
    return rows, _finished(report, rows)


def prompt_rows(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, source: str
) -> tuple[list[PromptRow], DataReport]:
    """Prompts to sample from. ``max_length`` is the prompt window, in tokens; longer prompts are dropped and counted.

    Errors as in sft_rows.
    """
    _check_length(max_length)
    report, encoder = DataReport(source), ConversationEncoder(tokenizer, source)
    rows = []
    for example in prompt_examples(dataset, report):
        ids = encoder.prompt(example)
        if len(ids) > max_length:
            report.drop("the prompt is longer than the window", example.index)
            continue
        rows.append(PromptRow(example.index, ids, example.prompt, example.columns, _prompt_key(example.prompt)))
    return rows, _finished(report, rows)


def _check_length(max_length: int) -> None:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length}")


def _prompt_key(prompt: Text) -> str:
    return hashlib.blake2b(json.dumps(prompt).encode(), digest_size=8).hexdigest()


def _finished(report: DataReport, rows: Iterable[SFTRow | PairRow | PromptRow]) -> DataReport:
    keys = [row.prompt_key for row in rows]
    report.kept, report.repeated_prompts = len(keys), len(keys) - len(set(keys))
    report.require_rows()
    return report
