import pytest
import torch

from rlhf_fast.data import PairRow, PromptRow, SFTRow, collate_pairs, collate_prompts, collate_sft, split_train_eval
from rlhf_fast.errors import UserError

PAD = 9


def pair(chosen: list[int], rejected: list[int], margin: float | None) -> PairRow:
    return PairRow(1, chosen, rejected, 1, 1, margin, "key")


def prompts(*keys: str) -> list[PromptRow]:
    return [PromptRow(index, [index], key, {}, key) for index, key in enumerate(keys, start=1)]


def test_sft_batch():
    batch = collate_sft([SFTRow(1, [5, 6, 7], [0, 1, 1], "a"), SFTRow(2, [PAD, 4], [0, 1], "b")], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [PAD, 4, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]], "a PAD id inside the text is text"
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 4, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_pair_batch_is_all_chosen_then_all_rejected():
    batch = collate_pairs([pair([1, 2, 3], [1, 4], 0.5), pair([5], [6, 7], None)], PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, PAD, PAD], [1, 4, PAD], [6, 7, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert batch["margin"].tolist() == [0.5, 0.0]
    assert (batch["input_ids"].dtype, batch["attention_mask"].dtype) == (torch.int64, torch.int64)
    assert batch["margin"].dtype == torch.float32
    assert collate_pairs([pair([1], [2], None)], PAD)["margin"] is None


def test_prompt_batch_is_padded_on_the_left():
    batch = collate_prompts([PromptRow(1, [5, 6, 7], "a", {}, "a"), PromptRow(2, [8], "b", {}, "b")], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("seed", range(20))
def test_a_split_never_has_a_prompt_on_both_sides(seed: int):
    rows = prompts(*(f"prompt {index % 17}" for index in range(100)))
    train, held_out = split_train_eval(rows, 0.2, seed)
    assert {row.prompt_key for row in train}.isdisjoint(row.prompt_key for row in held_out)
    assert sorted(row.index for row in train + held_out) == list(range(1, 101))
    assert 15 <= len(held_out) <= 20
    for side in (train, held_out):
        assert [row.index for row in side] == sorted(row.index for row in side)


def test_a_split_depends_on_its_seed_alone():
    rows = prompts(*map(str, range(50)))
    assert split_train_eval(rows, 10, 1) == split_train_eval(rows, 10, 1)
    assert split_train_eval(rows, 10, 1) != split_train_eval(rows, 10, 2)


@pytest.mark.parametrize(("eval_size", "expected"), [(0, 0), (1, 1), (49, 49), (0.1, 5), (0.001, 1), (0.98, 49)])
def test_the_held_out_part_has_the_size_asked_for(eval_size: int | float, expected: int):
    train, held_out = split_train_eval(prompts(*map(str, range(50))), eval_size, 0)
    assert (len(train), len(held_out)) == (50 - expected, expected)


def test_where_no_group_is_small_enough_the_smallest_is_held_out():
    train, held_out = split_train_eval(prompts("a", "a", "a", "b", "b"), 1, 0)
    assert [row.prompt for row in train] == ["a"] * 3 and [row.prompt for row in held_out] == ["b"] * 2


@pytest.mark.parametrize(("keys", "eval_size"), [("a", 1), ("a", 0.1), ("aaaa", 1), ("ab", 2), ("ab", 5), ("ab", 0.9)])
def test_too_few_rows_to_split(keys: str, eval_size: int | float):
    with pytest.raises(UserError, match="cannot hold out .* give more data, a smaller evaluation size, or 0"):
        split_train_eval(prompts(*keys), eval_size, 0)


@pytest.mark.parametrize("eval_size", [-1, 1.5, -0.5, 0.0, 1.0])
def test_senseless_sizes(eval_size: int | float):
    with pytest.raises(UserError, match="a number of rows or a share between 0 and 1"):
        split_train_eval(prompts("a", "b"), eval_size, 0)
