from collections.abc import Callable
from typing import Any

import datasets
import pytest
from tiny_tokenizer import CHAT_TEMPLATE, MARKED_TEMPLATE
from tokenizers import normalizers

from rlhf_fast.data import preference_rows, prompt_rows, sft_rows
from rlhf_fast.data.rows import Fault, Rows
from rlhf_fast.errors import UserError

RowsOf = Callable[..., datasets.Dataset]
USER_A = ["<|im_start|>", *"user", "Ċ", "a", "<|im_end|>", "Ċ"]
ASSISTANT = ["<|im_start|>", *"assistant", "Ċ"]
SOURCE = "rows.jsonl"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def sft(dataset: datasets.Dataset, tokenizer: Any, max_length: int = 999) -> tuple[list[str], list[int]]:
    """The tokens of the only row, as text, and its mask."""
    (row,), _ = sft_rows(dataset, tokenizer, max_length=max_length, source=SOURCE)
    return tokenizer.convert_ids_to_tokens(row.input_ids), row.response_mask


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_every_assistant_turn_and_its_end_is_marked_and_nothing_else(rows_of: RowsOf, tokenizer: Any, template: str):
    tokenizer.chat_template = template
    turns = [user("a"), assistant("bc"), user("a"), assistant("d")]
    tokens, mask = sft(rows_of({"messages": turns}), tokenizer)
    first, between, last = ["b", "c", "<|im_end|>"], ["Ċ", *USER_A, *ASSISTANT], ["d", "<|im_end|>"]
    assert tokens == [*USER_A, *ASSISTANT, *first, *between, *last], "the line break after the last turn is cut off"
    prompt_length = len(USER_A + ASSISTANT)
    assert mask == [0] * prompt_length + [1] * 3 + [0] * len(between) + [1] * 2


def test_the_tokens_are_those_of_the_whole_conversation(rows_of: RowsOf, tokenizer: Any):
    turns = [{"role": "system", "content": "s\n\n"}, user("q\n"), assistant("b\n\nc"), user("a"), assistant("d")]
    (row,), _ = sft_rows(rows_of({"messages": turns}), tokenizer, max_length=999, source=SOURCE)
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert [*row.input_ids, tokenizer.convert_tokens_to_ids("Ċ")] == whole


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_assistant_turns_of_the_prompt_are_not_trained_on(rows_of: RowsOf, tokenizer: Any, template: str):
    tokenizer.chat_template = template
    row = {"prompt": [user("a"), assistant("b"), user("a")], "completion": [assistant("c")]}
    tokens, mask = sft(rows_of(row), tokenizer)
    assert [token for token, live in zip(tokens, mask, strict=True) if live] == ["c", "<|im_end|>"]
    assert mask[-2:] == [1, 1]


def test_a_response_that_would_merge_into_the_prompt_starts_a_token_of_its_own(rows_of: RowsOf, tokenizer: Any):
    """The prompt ends with a line break and the response begins with one: generation sees two tokens, not "\\n\\n"."""
    dataset = rows_of({"messages": [user("a"), assistant("\nb")]})
    tokens, mask = sft(dataset, tokenizer)
    assert tokens == [*USER_A, *ASSISTANT, "Ċ", "b", "<|im_end|>"]
    assert mask == [0] * len(USER_A + ASSISTANT) + [1, 1, 1]
    (prompt,), _ = prompt_rows(dataset, tokenizer, max_length=99, source=SOURCE)
    assert tokenizer.convert_ids_to_tokens(prompt.input_ids) == USER_A + ASSISTANT


def test_a_template_without_an_end_token_gets_eos_at_the_end(rows_of: RowsOf, tokenizer: Any):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    tokens, mask = sft(rows_of({"messages": [user("x"), assistant("y")]}), tokenizer)
    assert tokens == [*"[u]x", "Ċ", *"[a]y", "<|im_end|>"]
    assert mask == [0] * 8 + [1, 1]


def test_a_template_that_rewrites_earlier_turns_is_named_with_the_row(rows_of: RowsOf, tokenizer: Any):
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(UserError, match=r"rows.jsonl, row 1: the chat template writes the turns before turn 2 differ"):
        sft_rows(rows_of({"messages": [user("a"), assistant("b")]}), tokenizer, max_length=99, source=SOURCE)


def test_a_template_that_refuses_the_turns_is_named_with_the_row(rows_of: RowsOf, tokenizer: Any):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT_TEMPLATE
    )
    turns = [user("a"), assistant("b")]
    refused = {"messages": [{"role": "system", "content": "s"}, *turns]}
    with pytest.raises(UserError, match=r"row 2: the chat template refuses these turns \(system, user\): no system"):
        sft_rows(rows_of({"messages": turns}, refused, refused), tokenizer, max_length=99, source=SOURCE)
    half = Rows([{"messages": turns}] * 10 + [refused] * 10, ["messages"], [], [Fault(21, "broken JSON")])
    with pytest.raises(UserError, match="11 of 21 rows cannot be used"):
        sft_rows(half, tokenizer, max_length=99, source=SOURCE)
    half.rows.append({"messages": turns})
    assert len(sft_rows(half, tokenizer, max_length=99, source=SOURCE)[0]) == 11, "lines left out count among all"
    (row,), report = sft_rows(rows_of({"messages": turns}, refused), tokenizer, max_length=99, source=SOURCE)
    assert report.lines()[1] == (
        "1 dropped: the chat template refuses these turns (system, user) (first: row 2: no system turn)"
    )


def test_a_template_that_leaves_the_response_out(rows_of: RowsOf, tokenizer: Any):
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="row 1: the chat template leaves the response out"):
        sft_rows(rows_of({"messages": [user("a"), assistant("b")]}), tokenizer, max_length=99, source=SOURCE)


def test_strings_are_joined_at_a_token_boundary_with_bos_before_and_eos_after(rows_of: RowsOf, bos_tokenizer: Any):
    tokens, mask = sft(rows_of({"prompt": "a\n", "completion": "\nb"}), bos_tokenizer)
    assert tokens == ["<s>", "a", "Ċ", "Ċ", "b", "<|endoftext|>"]
    assert mask == [0, 0, 0, 1, 1, 1]
    tokens, _ = sft(rows_of({"prompt": "a", "completion": "b<|endoftext|>"}), bos_tokenizer)
    assert tokens == ["<s>", "a", "b", "<|endoftext|>"], "an EOS in the data is not doubled"
    (prompt,), _ = prompt_rows(rows_of({"prompt": "a"}), bos_tokenizer, max_length=9, source=SOURCE)
    assert bos_tokenizer.convert_ids_to_tokens(prompt.input_ids) == ["<s>", "a"]


def test_chat_lists_need_a_template_but_transcripts_do_not(rows_of: RowsOf, bos_tokenizer: Any):
    with pytest.raises(UserError, match="row 1: .*no chat template; give one with --chat_template FILE, or use string"):
        sft_rows(rows_of({"messages": [user("a"), assistant("b")]}), bos_tokenizer, max_length=99, source=SOURCE)
    dataset = rows_of({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"})
    prompt = ["<s>", "ĊĊ", *"Human:", "Ġ", "a", "ĊĊ", *"Assistant:"]
    tokens, mask = sft(dataset, bos_tokenizer)
    assert tokens == [*prompt, "Ġ", "b", "<|endoftext|>"]
    assert mask == [0] * len(prompt) + [1, 1, 1]
    (row,), _ = prompt_rows(dataset, bos_tokenizer, max_length=99, source=SOURCE)
    assert bos_tokenizer.convert_ids_to_tokens(row.input_ids) == prompt


def test_transcripts_go_through_the_template_where_there_is_one(rows_of: RowsOf, tokenizer: Any):
    dataset = rows_of({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"})
    assert sft(dataset, tokenizer)[0] == [*USER_A, *ASSISTANT, "b", "<|im_end|>"]


def test_sft_rows_are_cut_on_the_right_and_dropped_where_no_response_is_left(rows_of: RowsOf, tokenizer: Any):
    texts = [("aaa", "b"), ("aa", "bcd"), ("aaaa", "b"), ("a", "b")]
    dataset = rows_of(*({"prompt": prompt, "completion": completion} for prompt, completion in texts))
    rows, report = sft_rows(dataset, tokenizer, max_length=4, source=SOURCE)
    assert [row.index for row in rows] == [1, 2, 4]
    assert [tokenizer.convert_ids_to_tokens(row.input_ids) for row in rows] == [
        ["a", "a", "a", "b"], ["a", "a", "b", "c"], ["a", "b", "<|im_end|>"],
    ]  # fmt: skip
    assert [row.response_mask for row in rows] == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1]]
    assert report.lines() == [
        "rows.jsonl: 3 rows kept",
        "1 dropped: the prompt fills the window (first: row 3)",
        "2 truncated to the longest length",
    ]


def test_pairs(rows_of: RowsOf, tokenizer: Any):
    texts = [("a", "bc", "d"), ("aaaaa", "b", "c"), ("a", "bbbbc", "bbbbd"), ("a", "bbbc", "d"), ("a", "x", "y")]
    dataset = rows_of(*({"prompt": p, "chosen": c, "rejected": r, "margin": 1} for p, c, r in texts))
    rows, report = preference_rows(dataset, tokenizer, max_length=5, source=SOURCE)
    assert [row.index for row in rows] == [1, 4, 5]
    assert tokenizer.convert_ids_to_tokens(rows[0].chosen_ids) == ["a", "b", "c", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(rows[0].rejected_ids) == ["a", "d", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(rows[1].chosen_ids) == ["a", "b", "b", "b", "c"]
    assert [(row.chosen_response_length, row.rejected_response_length) for row in rows] == [(3, 2), (4, 2), (2, 2)]
    assert [row.margin for row in rows] == [1.0, 1.0, 1.0]
    assert report.dropped == {
        "the prompt fills the window": 1,
        "chosen and rejected are the same tokens within the window": 1,
    }
    assert (report.kept, report.truncated, report.repeated_prompts) == (3, 1, 2)


def test_pairs_of_chat_lists(rows_of: RowsOf, tokenizer: Any):
    dataset = rows_of({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("cd")]})
    (row,), _ = preference_rows(dataset, tokenizer, max_length=99, source=SOURCE)
    assert tokenizer.convert_ids_to_tokens(row.chosen_ids) == [*USER_A, *ASSISTANT, "b", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(row.rejected_ids) == [*USER_A, *ASSISTANT, "c", "d", "<|im_end|>"]
    assert (row.chosen_response_length, row.rejected_response_length, row.margin) == (2, 3, None)


def test_prompts_keep_their_columns_and_the_long_ones_are_dropped(rows_of: RowsOf, tokenizer: Any):
    dataset = rows_of(*({"prompt": prompt, "answer": len(prompt)} for prompt in ("ab", "abcd", "abc", "ab")))
    rows, report = prompt_rows(dataset, tokenizer, max_length=3, source=SOURCE)
    assert [(row.index, row.prompt, row.columns) for row in rows] == [
        (1, "ab", {"answer": 2}), (3, "abc", {"answer": 3}), (4, "ab", {"answer": 2}),
    ]  # fmt: skip
    assert rows[0].prompt_key == rows[2].prompt_key != rows[1].prompt_key
    assert report.lines() == [
        "rows.jsonl: 3 rows kept",
        "1 dropped: the prompt is longer than the window (first: row 2)",
        "1 prompts repeat an earlier one (kept)",
    ]


def test_nothing_left_says_what_every_row_was_dropped_for(rows_of: RowsOf, tokenizer: Any):
    dataset = rows_of({"prompt": "a", "completion": ""}, {"prompt": "aaaa", "completion": "b"})
    with pytest.raises(UserError) as caught:
        sft_rows(dataset, tokenizer, max_length=3, source=SOURCE)
    assert str(caught.value) == (
        "rows.jsonl: no usable row is left (1 dropped: empty response (first: row 1); "
        "1 dropped: the prompt fills the window (first: row 2))"
    )


@pytest.mark.parametrize("encode", [sft_rows, preference_rows, prompt_rows])
def test_a_window_without_room_is_refused(rows_of: RowsOf, tokenizer: Any, encode: Any):
    with pytest.raises(ValueError, match="max_length must be at least 1 token, got 0"):
        encode(rows_of({"prompt": "a"}), tokenizer, max_length=0, source=SOURCE)


def test_a_prompt_of_no_tokens_is_dropped_and_counted(rows_of: RowsOf, tokenizer: Any):
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    texts = [("\u200b", "b"), ("a", "b")]
    (row,), report = prompt_rows(rows_of(*({"prompt": p} for p, _ in texts)), tokenizer, max_length=9, source=SOURCE)
    assert (row.index, report.dropped) == (2, {"empty prompt": 1})
    dataset = rows_of(
        *({"prompt": p, "completion": "" if p == "a" else "\u200b"} for p, _ in texts),
        {"prompt": "c", "completion": "d"},
    )
    (row,), report = sft_rows(dataset, tokenizer, max_length=9, source=SOURCE)
    assert (row.index, report.dropped) == (3, {"empty prompt": 1, "empty response": 1})


def test_alpaca_rows_without_a_chat_template_are_plain_text(rows_of: RowsOf, bos_tokenizer: Any):
    tokens, mask = sft(rows_of({"instruction": "a", "input": "b", "output": "c"}), bos_tokenizer)
    assert tokens == ["<s>", "a", "ĊĊ", "b", "ĊĊ", "c", "<|endoftext|>"]
    assert mask == [0] * 5 + [1, 1]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [user("a"), assistant("b")]}, "chat turns, written by the chat template"),
        ({"prompt": "a", "completion": "b"}, "plain text, and the chat template is not used"),
    ],
)
def test_the_form_of_the_prompts_is_said(rows_of: RowsOf, tokenizer: Any, row: dict[str, Any], form: str):
    _, report = sft_rows(rows_of(row), tokenizer, max_length=99, source=SOURCE)
    assert report.form().startswith(f"rows.jsonl: prompts are {form}")
