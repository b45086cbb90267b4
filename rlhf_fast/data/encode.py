"""Encodes data sets to rows of token ids up to a maximum length. The report counts dropped and truncated rows."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.answers import Encoded
from rlhf_fast.data.conversation import REWRITTEN, ConversationEncoder
from rlhf_fast.data.formats import EMPTY_PROMPT, Example, Table, preference_examples, prompt_examples, sft_examples
from rlhf_fast.data.report import MAX_UNUSABLE, DataReport
from rlhf_fast.data.turns import Text, Wrong

PROMPT_TOO_LONG = "the prompt fills the window"
PROMPT_BEYOND_WINDOW = "the prompt is longer than the window"
SAME_TOKENS = "chosen and rejected are the same tokens within the window"
SPECIAL_TEXT = (
    "rows spell a special token: it is taken as ordinary text; --special_tokens_in_data true takes it as the token"
)


@dataclass(frozen=True, slots=True)
class SFTRow:
    """``response_mask``: 1 on the tokens to train on. ``index``: the row in its source, from 1. ``prompt_key``: equal
    for rows with the same prompt."""

    index: int
    input_ids: list[int]
    response_mask: list[int]
    prompt_key: str


@dataclass(frozen=True, slots=True)
class PairRow:
    """``chosen_ids`` and ``rejected_ids`` each have prompt and response. The response lengths are in tokens, including
    EOS. ``margin``: by how much chosen is better, and ``subset``: to which part of a test set the pair belongs, if the
    data has them."""

    index: int
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_response_length: int
    rejected_response_length: int
    margin: float | None
    prompt_key: str
    subset: str | None = None


@dataclass(frozen=True, slots=True)
class PromptRow:
    """``input_ids`` end where the response begins. ``columns``: the source's other columns, for reward functions."""

    index: int
    input_ids: list[int]
    prompt: Text
    columns: dict[str, Any]
    prompt_key: str


EncodedRow = TypeVar("EncodedRow", SFTRow, PairRow, PromptRow)


@dataclass(frozen=True, slots=True)
class Reading:
    """How to treat invalid rows and special tokens in the data. ``strict``: the first invalid row is an error; else
    only a share of more than ``max_unusable``. ``special_tokens_in_data``: text of a special token becomes that token;
    else it is ordinary text."""

    strict: bool = False
    max_unusable: float = MAX_UNUSABLE
    special_tokens_in_data: bool = False


def sft_rows(
    dataset: Table,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    source: str,
    reading: Reading = Reading(),
) -> tuple[list[SFTRow], DataReport]:
    """Rows for supervised fine-tuning, truncated on the right to ``max_length`` tokens.

    Rows without a response token are dropped. ``source`` names the data set in errors and in the report. Raises
    UserError for wrong columns, if too many rows have a wrong structure, or if no row is left.
    """

    def encode(example: Example, encoder: ConversationEncoder, report: DataReport) -> SFTRow:
        encoded = encoder.response(example, example.responses[0])
        _note(report, example, encoded)
        mask = encoded.response_mask[:max_length]
        if not any(mask[1:]):  # the first token is not predicted
            raise _Drop(PROMPT_TOO_LONG if encoded.prompt_length else EMPTY_PROMPT)
        report.truncated += len(encoded.input_ids) > max_length
        return SFTRow(example.index, encoded.input_ids[:max_length], mask, _prompt_key(example))

    return _encode(sft_examples, encode, dataset, tokenizer, max_length, source, reading)


def preference_rows(
    dataset: Table,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    source: str,
    reading: Reading = Reading(),
) -> tuple[list[PairRow], DataReport]:
    """Pairs for the reward model, each side truncated on the right to ``max_length`` tokens.

    A pair is dropped and counted if its prompt fills the window, or if both sides are equal after truncation. A pair
    with a truncated side counts once as truncated. Errors as in sft_rows.
    """

    def encode(example: Example, encoder: ConversationEncoder, report: DataReport) -> PairRow:
        chosen, rejected = (encoder.response(example, response) for response in example.responses)
        _note(report, example, chosen, rejected)
        chosen_ids, rejected_ids = chosen.input_ids[:max_length], rejected.input_ids[:max_length]
        if chosen.prompt_length >= max_length:
            raise _Drop(PROMPT_TOO_LONG)
        if chosen_ids == rejected_ids:
            raise _Drop(SAME_TOKENS)
        report.truncated += max(len(chosen.input_ids), len(rejected.input_ids)) > max_length
        margin = example.columns["margin"]
        return PairRow(
            index=example.index,
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            chosen_response_length=len(chosen_ids) - chosen.prompt_length,
            rejected_response_length=len(rejected_ids) - rejected.prompt_length,
            margin=None if margin is None else float(margin),
            prompt_key=_prompt_key(example),
            subset=example.columns["subset"],
        )

    return _encode(preference_examples, encode, dataset, tokenizer, max_length, source, reading)


def prompt_rows(
    dataset: Table,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    source: str,
    reading: Reading = Reading(),
) -> tuple[list[PromptRow], DataReport]:
    """Prompts to sample from. ``max_length`` is the prompt window, in tokens; longer prompts are dropped and counted.

    Errors as in sft_rows.
    """

    def encode(example: Example, encoder: ConversationEncoder, report: DataReport) -> PromptRow:
        ids = encoder.prompt(example)
        if not ids:
            raise _Drop(EMPTY_PROMPT)
        if len(ids) > max_length:
            raise _Drop(PROMPT_BEYOND_WINDOW)
        return PromptRow(example.index, ids, example.prompt, example.columns, _prompt_key(example))

    return _encode(prompt_examples, encode, dataset, tokenizer, max_length, source, reading)


class _Drop(Exception):
    """The row is dropped, for this reason."""


def _encode(
    read: Callable[[Table, DataReport], Iterator[Example]],
    encode: Callable[[Example, ConversationEncoder, DataReport], EncodedRow],
    dataset: Table,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source: str,
    reading: Reading,
) -> tuple[list[EncodedRow], DataReport]:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length}")
    report = DataReport(source, strict=reading.strict, max_unusable=reading.max_unusable)
    encoder = ConversationEncoder(tokenizer, source, special_tokens_in_data=reading.special_tokens_in_data)
    rows: list[EncodedRow] = []
    for example in read(dataset, report):
        try:
            rows.append(encode(example, encoder, report))
        except _Drop as reason:
            report.drop(str(reason), example.index)
        except Wrong as fault:
            report.reject(fault.reason, example.index, fault.detail)
        else:
            form = encoder.form(example)
            report.forms[form] = report.forms.get(form, 0) + 1
            spelled = encoder.special_text(example)
            if spelled is not None:
                report.note(SPECIAL_TEXT, example.index, f", {spelled!r}")
    report.require_usable()  # again, because the template may have refused more rows
    report.facts = encoder.facts(report.forms)
    keys = [row.prompt_key for row in rows]
    report.kept, report.repeated_prompts = len(keys), len(keys) - len(set(keys))
    report.require_rows()
    return rows, report


def _note(report: DataReport, example: Example, *sides: Encoded) -> None:
    if any(side.rewritten for side in sides):
        report.note(REWRITTEN, example.index)


def _prompt_key(example: Example) -> str:
    asked = [example.prompt, example.template] if example.template else example.prompt
    return hashlib.blake2b(json.dumps(asked, default=str).encode(), digest_size=8).hexdigest()
