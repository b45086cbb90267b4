"""Pads rows to tensors, and splits rows into a training and a held-out part."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch

from rlhf_fast.data.encode import PairRow, PromptRow, SFTRow
from rlhf_fast.errors import UserError

IGNORE_INDEX = -100


class HasPrompt(Protocol):
    """A row that can be split by prompt."""

    @property
    def prompt_key(self) -> str: ...


Row = TypeVar("Row", bound=HasPrompt)


def collate_sft(rows: Sequence[SFTRow], pad_id: int) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` (1 = a token) and ``labels``, each int64 (B, T), padded on the right.

    Labels are at the position of their token (not shifted), and -100 on prompt and padding.
    """
    labels = [
        [token if live else IGNORE_INDEX for token, live in zip(row.input_ids, row.response_mask, strict=True)]
        for row in rows
    ]
    return {**_right_padded([row.input_ids for row in rows], pad_id), "labels": _pad_right(labels, IGNORE_INDEX)}


def collate_pairs(rows: Sequence[PairRow], pad_id: int) -> dict[str, torch.Tensor | None]:
    """``input_ids``, ``attention_mask`` (1 = a token) and ``response_mask`` (1 = a response token), int64 (2B, T): all
    chosen, then all rejected, padded on the right; ``margin``, float32 (B,), or None where no row has one (a row
    without one among others counts as 0)."""
    margins = [row.margin for row in rows]
    margin = None
    if any(value is not None for value in margins):
        margin = torch.tensor([value or 0.0 for value in margins], dtype=torch.float32)
    sides = [row.chosen_ids for row in rows] + [row.rejected_ids for row in rows]
    responses = [row.chosen_response_length for row in rows] + [row.rejected_response_length for row in rows]
    masks = [[0] * (len(ids) - response) + [1] * response for ids, response in zip(sides, responses, strict=True)]
    return {**_right_padded(sides, pad_id), "response_mask": _pad_right(masks, 0), "margin": margin}


def collate_prompts(rows: Sequence[PromptRow], pad_id: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` (1 = a token), int64 (B, T), padded on the LEFT, so that every response
    begins at column T."""
    longest = max(len(row.input_ids) for row in rows)
    pads = [longest - len(row.input_ids) for row in rows]
    ids = [[pad_id] * pad + row.input_ids for row, pad in zip(rows, pads, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    return {"input_ids": torch.tensor(ids, dtype=torch.long), "attention_mask": torch.tensor(mask, dtype=torch.long)}


def _right_padded(ids: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    # The mask is computed from the lengths, because the PAD id may also occur in the text.
    return {"input_ids": _pad_right(ids, pad_id), "attention_mask": _pad_right([[1] * len(row) for row in ids], 0)}


def _pad_right(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


def split_train_eval(rows: Sequence[Row], eval_size: int | float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, in their original order; deterministic for a seed.

    ``eval_size``: a number of rows (int, 0 = none) or a share of them (float in (0, 1)). Rows with the same prompt
    stay on one side, so that no held-out prompt is trained on. The held-out part may therefore be smaller than asked
    for. It is larger only if every prompt has more rows than that; then it is the prompt with the fewest.
    Raises UserError if either side would be empty.
    """
    wanted = eval_size if isinstance(eval_size, int) else max(1, round(eval_size * len(rows)))
    if wanted == 0:
        return list(rows), []
    if wanted < 0 or (isinstance(eval_size, float) and not 0 < eval_size < 1):
        raise UserError(f"the evaluation size must be a number of rows or a share between 0 and 1, got {eval_size}")
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.prompt_key, []).append(place)
    if len(groups) < 2 or wanted >= len(rows):
        raise UserError(
            f"cannot hold out {wanted} of {len(rows)} rows with {len(groups)} different prompts and have some left to "
            "train on: give more data, a smaller evaluation size, or 0"
        )
    keys = list(groups)
    generator = torch.Generator().manual_seed(seed)
    held_out: set[int] = set()
    for position in torch.randperm(len(keys), generator=generator).tolist():
        group = groups[keys[position]]
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if not held_out:
        smallest: list[int] = min(groups.values(), key=len)
        held_out.update(smallest)
    train = [row for place, row in enumerate(rows) if place not in held_out]
    return train, [row for place, row in enumerate(rows) if place in held_out]
