"""Loads a stage's training and held-out rows, and reports the dropped ones."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_fast.config import StageConfig
from rlhf_fast.data import (
    DataReport,
    PairRow,
    PromptRow,
    Reading,
    SFTRow,
    load_dataset,
    prompt_rows,
    split_train_eval,
)
from rlhf_fast.errors import UserError
from rlhf_fast.recipes.identity import fingerprint
from rlhf_fast.recipes.stage import Stage

Row = TypeVar("Row", SFTRow, PairRow, PromptRow)


def load_rows(
    stage: Stage[StageConfig], encode: Callable[..., tuple[list[Row], DataReport]], max_length: int
) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) of the stage's data sets, encoded to at most ``max_length`` tokens.

    The held-out rows are those of eval_dataset_name if it is set, else eval_size of the training data, split by prompt.
    """
    rows, held_out = _split_rows(stage, encode, max_length)
    stage.rows |= {"training data": fingerprint(rows), "held-out data": fingerprint(held_out)}
    if len(rows) < stage.config.batch_size:
        stage.say(
            f"--batch_size {stage.config.batch_size} is more than the {len(rows)} training rows: every batch holds "
            "some rows more than once"
        )
    return rows, held_out


def _split_rows(
    stage: Stage[StageConfig], encode: Callable[..., tuple[list[Row], DataReport]], max_length: int
) -> tuple[list[Row], list[Row]]:
    config = stage.config
    read = partial(_read, stage, encode, max_length)
    rows = read(config.dataset_name, config.dataset_split, config.max_samples)
    if config.eval_dataset_name is not None:
        held_out = read(config.eval_dataset_name, config.eval_dataset_split, None)
        shared = {row.prompt_key for row in rows} & {row.prompt_key for row in held_out}
        if shared:
            count = sum(row.prompt_key in shared for row in held_out)
            stage.say(f"{config.eval_dataset_name}: {count} held-out rows have a prompt that is trained on: left out")
            held_out = [row for row in held_out if row.prompt_key not in shared]
            if not held_out:
                raise UserError(f"{config.eval_dataset_name}: every held-out prompt is trained on; name other data")
        return rows, held_out
    return hold_out(config, rows)


def hold_out(config: StageConfig, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): eval_size of ``rows`` held out, by prompt."""
    size = int(config.eval_size) if config.eval_size >= 1 or config.eval_size == 0 else config.eval_size
    try:
        return split_train_eval(rows, size, config.seed)
    except UserError as error:
        raise UserError(f"{config.dataset_name}, --eval_size {config.eval_size:g}: {error}") from error


def load_prompts(stage: Stage[StageConfig], name: str, split: str, max_length: int) -> list[PromptRow]:
    """The prompts of a data set in any format, for sampling."""
    return _read(stage, prompt_rows, max_length, name, split, None, purpose=", prompts to sample from")


def _read(
    stage: Stage[StageConfig],
    encode: Callable[..., Any],
    max_length: int,
    name: str,
    split: str,
    limit: int | None,
    purpose: str = "",
) -> Any:
    dataset = open_table(stage.config, name, split, limit)
    rows, report = encode_table(stage.config, stage.base.tokenizer, encode, dataset, max_length, name + purpose)
    for line in [*report.lines(), report.form()]:
        stage.say(line)
    for row in rows:
        ids = [*row.chosen_ids, *row.rejected_ids] if isinstance(row, PairRow) else row.input_ids
        stage.base.check_tokens(name, row.index, ids)
    return rows


def open_table(config: StageConfig, name: str, split: str, limit: int | None) -> Any:
    """A data set's rows as the config reads them: with its renames, before they are encoded."""
    return load_dataset(name, split=split, rename=config.rename_columns, limit=limit, strict=config.strict)


def encode_table(
    config: StageConfig,
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[..., Any],
    dataset: Any,
    max_length: int,
    source: str,
) -> tuple[Any, DataReport]:
    """``encode`` is sft_rows, preference_rows or prompt_rows; returns what it returns."""
    reading = Reading(config.strict, config.max_unusable_rows, config.special_tokens_in_data)
    return encode(dataset, tokenizer, max_length=max_length, source=source, reading=reading)
