from collections.abc import Callable
from typing import Any

import datasets
import pyarrow
import pytest

from rlhf_fast.data.formats import Example, preference_examples, prompt_examples, sft_examples
from rlhf_fast.data.report import DataReport
from rlhf_fast.data.rows import Fault, Rows
from rlhf_fast.data.turns import format_transcript, parse_transcript
from rlhf_fast.errors import UserError

RowsOf = Callable[..., datasets.Dataset]
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def one(reader: Callable[..., Any], dataset: datasets.Dataset) -> Example:
    report = DataReport("rows.jsonl")
    (example,) = list(reader(dataset, report))
    assert report.dropped == {}
    return example


def dropped(reader: Callable[..., Any], dataset: datasets.Dataset) -> tuple[dict[str, int], dict[str, int]]:
    report = DataReport("rows.jsonl")
    list(reader(dataset, report))
    return report.dropped, report.first


def fault(reader: Callable[..., Any], dataset: datasets.Dataset) -> str:
    with pytest.raises(UserError) as caught:
        list(reader(dataset, DataReport("rows.jsonl")))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sft_from_messages_trains_on_every_assistant_turn(rows_of: RowsOf):
    system = {"role": "system", "content": "s"}
    turns = [system, user("a"), assistant("b"), user("c"), assistant("d")]
    example = one(sft_examples, rows_of({"messages": turns}))
    assert (example.index, example.prompt, example.responses) == (1, turns[:2], (turns[2:],))


def test_sft_from_prompt_and_completion(rows_of: RowsOf):
    strings = one(sft_examples, rows_of({"prompt": "a", "completion": "b"}))
    assert (strings.prompt, strings.responses) == ("a", ("b",))
    chats = one(sft_examples, rows_of({"prompt": [user("a")], "completion": [assistant("b")]}))
    assert (chats.prompt, chats.responses) == ([user("a")], ([assistant("b")],))


def test_sft_from_the_chosen_side(rows_of: RowsOf):
    strings = one(sft_examples, rows_of({"prompt": "a", "chosen": "b", "rejected": "c"}))
    assert (strings.prompt, strings.responses) == ("a", ("b",))
    transcript = one(sft_examples, rows_of({"chosen": HH + " d", "rejected": HH + " e"}))
    assert transcript.prompt == [user("a"), assistant("b"), user("c")]
    assert transcript.responses == ([assistant("d")],)
    assert transcript.transcript


def test_preferences_from_three_columns(rows_of: RowsOf):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2, "subset": "chat\nhard"}
    strings = one(preference_examples, rows_of(row))
    columns = {"margin": 2, "subset": "chat hard"}
    assert (strings.prompt, strings.responses, strings.columns) == ("a", ("b", "c"), columns)
    row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    chats = one(preference_examples, rows_of(row))
    assert (chats.prompt, chats.responses) == ([user("a")], ([assistant("b")], [assistant("c")]))
    assert chats.columns == {"margin": None, "subset": None}


@pytest.mark.parametrize("extra", [{}, {"prompt": "a"}])
def test_preferences_with_the_prompt_inside_the_chat_lists(rows_of: RowsOf, extra: dict[str, str]):
    row = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], **extra}
    example = one(preference_examples, rows_of(row))
    assert (example.prompt, example.responses) == ([user("a")], ([assistant("b")], [assistant("c")]))


def test_preferences_that_part_early_share_only_the_turns_before(rows_of: RowsOf):
    shared = [user("a"), assistant("b"), user("c")]
    chosen, rejected = [*shared, assistant("d"), user("x"), assistant("y")], [*shared, assistant("e")]
    example = one(preference_examples, rows_of({"chosen": chosen, "rejected": rejected}))
    assert (example.prompt, example.responses) == (shared, (chosen[3:], rejected[3:]))


def test_preferences_that_part_at_a_user_turn_share_the_prompt_before_the_last_common_answer(rows_of: RowsOf):
    chosen = [user("a"), assistant("b"), user("c"), assistant("d")]
    rejected = [user("a"), assistant("b"), user("x"), assistant("e")]
    example = one(preference_examples, rows_of({"chosen": chosen, "rejected": rejected}))
    assert (example.prompt, example.responses) == (chosen[:1], (chosen[1:], rejected[1:]))


def test_preferences_from_transcripts(rows_of: RowsOf):
    example = one(preference_examples, rows_of({"chosen": HH + " d", "rejected": HH + " e"}))
    assert example.prompt == [user("a"), assistant("b"), user("c")]
    assert example.responses == ([assistant("d")], [assistant("e")])
    assert example.transcript


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a"}, "a"),
        ({"prompt": "a", "completion": "b"}, "a"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a"),
        ({"prompt": [user("a")]}, [user("a")]),
        ({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}, [user("a"), assistant("b"), user("c")]),
        ({"messages": [user("a")]}, [user("a")]),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, [user("a")]),
        ({"chosen": HH + " d", "rejected": HH + " e"}, [user("a"), assistant("b"), user("c")]),
        ({"chosen": HH, "rejected": HH}, [user("a"), assistant("b"), user("c")]),
    ],
)
def test_prompts_from_every_format_keep_the_other_columns(rows_of: RowsOf, row: dict[str, Any], prompt: Any):
    example = one(prompt_examples, rows_of({**row, "answer": 3, "level": "x"}))
    assert (example.prompt, example.responses) == (prompt, ())
    assert example.columns == {"answer": 3, "level": "x"}


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (HH + " d", [user("a"), assistant("b"), user("c"), assistant("d")]),
        (
            "\n\nHuman: say Human: or Assistant: now\n\nAssistant: ok",
            [user("say Human: or Assistant: now"), assistant("ok")],
        ),
        ("\n\nHuman: one\nHuman: two\n\nAssistant: ok", [user("one\nHuman: two"), assistant("ok")]),
        ("\n\nHuman: a\n\nsecond paragraph\n\nAssistant: b", [user("a\n\nsecond paragraph"), assistant("b")]),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", [user("a\n\nb"), assistant("c")]),
        ("\n\nHuman: a\n\nAssistant:", [user("a"), assistant("")]),
        ("\n\nHuman:a\n\nAssistant:b  \n", [user("a"), assistant("b")]),
    ],
)
def test_transcripts(text: str, turns: list[dict[str, str]]):
    assert parse_transcript(text) == turns


def test_a_written_transcript_reads_back():
    turns = [user("a"), assistant("b"), user("c")]
    assert format_transcript(turns, answer_next=True) == HH
    assert parse_transcript(format_transcript([*turns, assistant("d")])) == [*turns, assistant("d")]


EMPTY_ROWS = [
    (sft_examples, {"prompt": "a", "completion": " \n"}, "empty response"),
    (sft_examples, {"prompt": "a", "completion": None}, "empty response"),
    (sft_examples, {"prompt": "", "completion": "b"}, "empty prompt"),
    (sft_examples, {"prompt": None, "completion": "b"}, "empty prompt"),
    (sft_examples, {"messages": []}, "empty response"),
    (sft_examples, {"messages": [user("a"), assistant("")]}, "empty response"),
    (sft_examples, {"messages": [user("a"), assistant(" "), user("b"), assistant("c")]}, "empty response"),
    (sft_examples, {"messages": [user(" "), assistant("b")]}, "empty prompt"),
    (sft_examples, {"messages": [{"role": "system", "content": "s"}, assistant("b")]}, "empty prompt"),
    (sft_examples, {"messages": [assistant("b")]}, "empty prompt"),
    (sft_examples, {"chosen": HH, "rejected": HH + " e"}, "empty response"),
    (preference_examples, {"prompt": "a", "chosen": "b", "rejected": ""}, "empty response"),
    (preference_examples, {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    (preference_examples, {"chosen": HH + " d", "rejected": HH + " d "}, "chosen and rejected are the same"),
    (preference_examples, {"chosen": HH + " d", "rejected": HH}, "empty response"),
    (
        preference_examples,
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
        "chosen and rejected share no prompt",
    ),
    (prompt_examples, {"prompt": "  "}, "empty prompt"),
    (prompt_examples, {"prompt": []}, "empty prompt"),
    (prompt_examples, {"prompt": [user("")]}, "empty prompt"),
]


@pytest.mark.parametrize(("reader", "row", "reason"), EMPTY_ROWS)
def test_rows_with_nothing_to_learn_are_counted(rows_of: RowsOf, reader: Any, row: dict[str, Any], reason: str):
    assert dropped(reader, rows_of(row)) == ({reason: 1}, {reason: 1})


def test_drops_are_counted_by_reason_and_the_others_kept(rows_of: RowsOf):
    texts = [("a", "b"), ("a", ""), ("", "b"), ("c", "d"), ("e", "")]
    dataset = rows_of(*({"prompt": prompt, "completion": completion} for prompt, completion in texts))
    report = DataReport("rows.jsonl")
    assert [example.index for example in sft_examples(dataset, report)] == [1, 4]
    assert report.dropped == {"empty response": 2, "empty prompt": 1}
    assert report.first == {"empty response": 2, "empty prompt": 3}


WRONG_ROWS = [
    (sft_examples, {"messages": [user("a")]}, "messages ends with a turn of the user; expected the assistant's"),
    (sft_examples, {"messages": "hello"}, "messages: expected a list of chat turns, got str 'hello'"),
    (
        sft_examples,
        {"messages": [{"role": "asistant", "content": "b"}]},
        "unknown role 'asistant' (did you mean 'assistant'?)",
    ),
    (sft_examples, {"messages": [user(3), assistant(4)]}, "the user's content must be a string, got int 3"),
    (sft_examples, {"messages": [{"speaker": "human", "value": "b"}]}, "a turn must have 'role' and 'content'"),
    (
        sft_examples,
        {"messages": [user([{"type": "image", "url": "x"}]), assistant([{"type": "text", "text": "b"}])]},
        "the user's content must be text, got a part of type 'image'",
    ),
    (sft_examples, {"prompt": 7, "completion": "b"}, "prompt: expected a string or a list of chat turns, got int 7"),
    (
        sft_examples,
        {"prompt": "a", "completion": [assistant("b")]},
        "prompt is a string and completion a chat list; expected both",
    ),
    (
        sft_examples,
        {"prompt": [user("a"), assistant("b")], "completion": [assistant("c")]},
        "the prompt ends with an assistant turn",
    ),
    (
        sft_examples,
        {"prompt": [user("a")], "completion": [user("b"), assistant("c")]},
        "completion begins with a turn of the user",
    ),
    (sft_examples, {"chosen": "no marks", "rejected": "x"}, "that begins with '\\n\\nHuman:', got 'no marks'"),
    (preference_examples, {"chosen": "\n\nHuman: e", "rejected": HH + " f"}, "chosen ends with a turn of the user"),
    (preference_examples, {"chosen": HH + " d", "rejected": "hello" + HH}, "a transcript that begins with"),
    (
        preference_examples,
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"},
        "margin must be a number, got str 'big'",
    ),
    (
        preference_examples,
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("inf")},
        "margin must be a number, got float inf",
    ),
    (
        preference_examples,
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e39},
        "margin must be a number, got float 1e+39; at most 1e+12 in size",
    ),
    (
        preference_examples,
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "9" * 400},
        "margin must be a number, got str '999",
    ),
    (prompt_examples, {"prompt": [user("a"), assistant("b")]}, "the prompt ends with an assistant turn"),
    (
        prompt_examples,
        {"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]},
        "prompt is a string and chosen a chat list; expected both",
    ),
    (sft_examples, {"instruction": 7, "output": "b"}, "instruction: expected text, got int 7"),
]


@pytest.mark.parametrize(("reader", "row", "expected"), WRONG_ROWS)
def test_rows_of_the_wrong_structure_are_named(rows_of: RowsOf, reader: Any, row: dict[str, Any], expected: str):
    text = fault(reader, rows_of(row))
    assert text.startswith("rows.jsonl, row 1: ") and expected in text


GOOD, WRONG = {"messages": [user("a"), assistant("b")]}, {"messages": [{"role": "robot", "content": "x"}]}


def test_a_wrong_row_is_counted_with_its_number_reason_and_first_example(rows_of: RowsOf):
    report = DataReport("rows.jsonl")
    examples = list(sft_examples(rows_of(GOOD, WRONG, GOOD, WRONG, GOOD), report))
    assert [example.index for example in examples] == [1, 3, 5]
    (line,) = report.lines()[1:]
    assert line.startswith("2 dropped: messages: unknown role (first: row 2 'robot'; expected one of")


def test_more_than_the_stated_share_of_wrong_rows_stops(rows_of: RowsOf):
    dataset = rows_of(GOOD, WRONG, WRONG)
    text = fault(sft_examples, dataset)
    assert text.startswith("rows.jsonl, row 2: messages: unknown role 'robot'")
    assert text.endswith("2 of 3 rows cannot be used")
    assert len(list(sft_examples(dataset, DataReport("x", max_unusable=0.7)))) == 1
    with pytest.raises(UserError, match="row 2: "):
        list(sft_examples(rows_of(GOOD, WRONG, GOOD, GOOD), DataReport("x", max_unusable=0.2)))


def test_strict_stops_at_the_first_wrong_row(rows_of: RowsOf):
    with pytest.raises(UserError, match="x, row 2: messages: unknown role 'robot'"):
        list(sft_examples(rows_of(GOOD, WRONG, *[GOOD] * 99), DataReport("x", strict=True)))


def test_lines_of_the_file_are_named_where_rows_are_other_numbers():
    rows = Rows([GOOD, WRONG], ["messages"], [2, 5], [Fault(7, "broken JSON", "why")])
    report = DataReport("rows.jsonl", max_unusable=0.9)
    list(sft_examples(rows, report))
    assert report.lines()[1] == "1 dropped: broken JSON (first: line 7 (why))"
    assert "(first: row 2 (line 5) 'robot'" in report.lines()[2]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([user("a"), assistant("b"), user("thanks")], [user("a"), assistant("b")]),
        ([user("a"), assistant("b"), {"role": "tool", "content": "1"}, user("c")], [user("a"), assistant("b")]),
        ([assistant("hello"), user("a"), assistant("b")], [assistant("hello"), user("a"), assistant("b")]),
    ],
)
def test_a_conversation_is_cut_after_the_last_answer_and_a_greeting_is_context(
    rows_of: RowsOf, turns: list[dict[str, Any]], expected: list[dict[str, Any]]
):
    report = DataReport("rows.jsonl")
    (example,) = sft_examples(rows_of({"messages": turns}), report)
    assert [*example.prompt, *example.responses[0]] == expected
    assert example.responses == ([assistant("b")],)
    cut = len(expected) < len(turns)
    assert any("go on after the assistant's last turn" in line for line in report.lines()) == cut


def test_a_preference_that_ends_with_the_user_is_cut(rows_of: RowsOf):
    report = DataReport("rows.jsonl")
    dataset = rows_of({"chosen": HH + " d\n\nHuman: e", "rejected": HH + " f"})
    (example,) = preference_examples(dataset, report)
    assert example.responses == ([assistant("d")], [assistant("f")])


def sharegpt(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": name, "value": text} for name, text in said]


def test_sharegpt_rows_are_read_as_they_are(rows_of: RowsOf):
    talk = sharegpt(("system", "s"), ("human", "a"), ("gpt", "b"), ("HUMAN", "c"), ("assistant", "d"))
    example = one(sft_examples, rows_of({"conversations": talk, "id": "1"}))
    assert example.prompt == [{"role": "system", "content": "s"}, user("a")]
    assert example.responses == ([assistant("b"), user("c"), assistant("d")],)
    assert one(prompt_examples, rows_of({"conversations": talk[:-1]})).prompt[-1] == user("c")
    example = one(sft_examples, rows_of({"conversations": talk[1:], "system": "be brief"}))
    assert example.prompt[0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize("one_turn", [lambda turn: turn, lambda turn: [turn]])
def test_sharegpt_preferences(rows_of: RowsOf, one_turn: Callable[[Any], Any]):
    better, worse = sharegpt(("gpt", "b"), ("gpt", "c"))
    row = {"conversations": sharegpt(("human", "a")), "chosen": one_turn(better), "rejected": one_turn(worse)}
    example = one(preference_examples, rows_of(row))
    assert (example.prompt, example.responses) == ([user("a")], ([assistant("b")], [assistant("c")]))
    assert one(prompt_examples, rows_of(row)).prompt == [user("a")]


def test_alpaca_rows_are_read_as_they_are(rows_of: RowsOf):
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    example = one(sft_examples, rows_of(row))
    assert (example.prompt, example.responses) == ([user("add\n\n1 2")], ([assistant("3")],))
    asked = one(prompt_examples, rows_of({**row, "answer": 3}))
    assert asked.prompt == example.prompt
    assert asked.columns == {**row, "answer": 3}, "a reward function may compare with the row's own output"
    more = {"instruction": "go on", "input": "", "output": "x", "system": "s", "history": [["a", "b"]]}
    assert one(sft_examples, rows_of(more)).prompt == [
        {"role": "system", "content": "s"}, user("a"), assistant("b"), user("go on"),
    ]  # fmt: skip
    pair = one(preference_examples, rows_of({"instruction": "a", "chosen": "b", "rejected": "c"}))
    assert (pair.prompt, pair.responses) == ([user("a")], ([assistant("b")], [assistant("c")]))


def test_dolly_rows_and_the_columns_that_are_named_where_some_are_missing(rows_of: RowsOf):
    example = one(sft_examples, rows_of({"instruction": "Q?", "context": "ctx", "response": "R"}))
    assert (example.prompt, example.responses) == ([user("Q?\n\nctx")], ([assistant("R")],))
    assert "found ['instruction', 'answer']" in fault(sft_examples, rows_of({"instruction": "Q?", "answer": "R"}))


def test_a_system_column_is_the_first_turn_of_a_chat_that_has_none(rows_of: RowsOf):
    system = {"role": "system", "content": "s"}
    assert one(sft_examples, rows_of({"system": "s", "messages": [user("a"), assistant("b")]})).prompt == [
        system, user("a"),
    ]  # fmt: skip
    own = [{"role": "system", "content": "own"}, user("a"), assistant("b")]
    assert one(sft_examples, rows_of({"system": "s", "messages": own})).prompt == own[:2]
    report = DataReport("x")
    (example,) = sft_examples(rows_of({"system": "s", "prompt": "a", "completion": "b"}), report)
    assert example.prompt == "a"
    assert "1 rows have a system column, which prompts of plain text do not use" in report.lines()[1]


def test_an_older_function_call_is_a_tool_call():
    call = {"name": "f", "arguments": '{"x": 1}'}
    turns = [
        user("a"),
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "content": "1"},
    ]
    rows = Rows([{"messages": [*turns, assistant("b")]}], ["messages"])
    example = one(sft_examples, rows)  # type: ignore[arg-type]
    assert example.responses[0][0]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]


def test_a_value_that_arrow_cannot_give_costs_one_row():
    days = pyarrow.array([0, 2**31 - 1, 1], pyarrow.int32()).cast(pyarrow.date32())
    table = pyarrow.table({"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"], "day": days})
    report = DataReport("x")
    assert [example.index for example in sft_examples(datasets.Dataset(table), report)] == [1, 3]
    assert "1 dropped: a value that cannot be read (first: row 2 (OverflowError" in report.lines()[1]


def test_text_parts_are_joined_and_arrow_s_missing_keys_are_no_content(rows_of: RowsOf):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": parts, "name": None}, {"role": "assistant", "content": [{"text": "c"}]}]
    rows = Rows([{"messages": turns}], ["messages"])
    example = one(sft_examples, rows)  # type: ignore[arg-type]
    assert (example.prompt, example.responses) == ([user("ab")], ([assistant("c")],))


def test_csv_margins_are_numbers(rows_of: RowsOf):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": text} for text in ("0.5", "2", "")]
    assert [example.columns["margin"] for example in preference_examples(rows_of(*rows), DataReport("x"))] == [
        0.5, 2.0, None,
    ]  # fmt: skip


SAME_PROMPT = [
    {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    {"prompt": "a", "messages": [user("a"), assistant("b")]},
    {
        "prompt": "a",
        "chosen": [user("a"), assistant("b")],
        "rejected": [user("a"), assistant("c")],
        "messages": [user("a"), assistant("b")],
    },
    {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    {"prompt": [user("a")], "completion": [assistant("b")]},
    {"prompt": "a", "completion": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": HH + " d", "rejected": HH + " e"},
    {"prompt": HH, "chosen": " d", "rejected": " e"},
    {"prompt": HH, "chosen": HH + " d", "rejected": HH + " e"},
    {"prompt": HH, "completion": " d"},
    {
        "chosen": [user("a"), assistant("b"), user("x"), assistant("y")],
        "rejected": [user("a"), assistant("c"), user("x"), assistant("z")],
    },
    {"conversations": sharegpt(("human", "a"), ("gpt", "b"))},
    {"prompt": "a", "conversations": sharegpt(("human", "a"), ("gpt", "b"))},
    {"system": "s", "messages": [user("a"), assistant("b")]},
    {"system": "s", "prompt": [user("a")], "completion": [assistant("b")]},
    {"system_prompt": "s", "conversations": sharegpt(("human", "a"), ("gpt", "b"))},
    {"instruction": "a", "context": "c", "response": "b"},
    {"instruction": "a", "completion": "b"},
    {"instruction": "a", "input": "", "output": "b", "chosen": "b", "rejected": "c"},
]


@pytest.mark.parametrize("row", SAME_PROMPT)
def test_one_row_has_one_prompt_in_every_stage(rows_of: RowsOf, row: dict[str, Any]):
    dataset = rows_of(row)
    asked = one(prompt_examples, dataset)
    if {"messages", "completion", "chosen", "conversations", "output"} & row.keys():
        assert one(sft_examples, dataset).prompt == asked.prompt
    if "chosen" in row:
        example = one(preference_examples, dataset)
        assert (example.prompt, example.transcript) == (asked.prompt, asked.transcript)


@pytest.mark.parametrize(
    ("reader", "columns", "expected"),
    [
        (sft_examples, ["promt", "completion"], "found ['promt', 'completion']; 'promt' (did you mean 'prompt'?)"),
        (sft_examples, ["question", "answer"], "expected the columns messages, or prompt and completion, or chosen"),
        (preference_examples, ["prompt", "chosen"], "expected the columns chosen and rejected"),
        (prompt_examples, ["mesages"], "'mesages' (did you mean 'messages'?)"),
    ],
)
def test_missing_columns_are_named(rows_of: RowsOf, reader: Any, columns: list[str], expected: str):
    assert expected in fault(reader, rows_of(dict.fromkeys(columns, "x")))
