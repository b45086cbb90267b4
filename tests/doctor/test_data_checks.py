"""The doctor's checks of tokens, rows and pairs: sound data pass, and each defect is found."""

import re

import pytest
from command_lines import write_jsonl
from sound_stages import chat, rows_of

from rlhf_fast.data import SFTRow
from rlhf_fast.doctor import pairs, rows, subject, tokens

SOUND = [*tokens.CHECKS, *rows.CHECKS]


def pair(asked: str, chosen: str, rejected: str) -> dict:
    return {"prompt": chat(asked), "chosen": chat(chosen, "assistant"), "rejected": chat(rejected, "assistant")}


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_sound_data_pass(data_of, stage):
    data = data_of(stage, eval_size=2, max_steps=20)
    checks = [*SOUND, *(pairs.CHECKS if stage in ("reward", "dpo") else [])]
    found = {check.__name__: check(data) for check in checks}
    few = {"held_out"} if stage in ("reward", "dpo") else set()  # two pairs
    assert {name for name, one in found.items() if one is not None and one.level != "ok"} == few


SPELT = [*rows_of("sft"), {"messages": chat("close it <end> now") + chat("no", "assistant")}]
EMPTY = [*rows_of("sft"), {"messages": chat("q") + chat(" ", "assistant")}]
LONG = [*rows_of("sft"), {"messages": chat("q") + chat("long " * 30, "assistant")}]
TWICE = [*rows_of("sft"), *rows_of("sft")[:3]]
PLAIN = [{"prompt": f"q{i}", "completion": "a"} for i in range(12)]
LONGER = [pair(f"q{i}", "a long answer", "short") for i in range(60)]
BOTH = [*(pair(f"q{i}", "yes", "no") for i in range(12)), pair("q3", "no", "yes")]
SAME = [*(pair(f"q{i}", "yes", "no") for i in range(12)), pair("q", "yes", "yes"), pair("p", "x" * 80, "x" * 81)]


@pytest.mark.parametrize(
    ("check", "stage", "made", "settings", "level", "said"),
    [
        (tokens.trained_tokens, "sft", PLAIN, {}, "note", "the chat template is not used; .*: 12 rows"),
        (tokens.special_tokens, "sft", SPELT, {}, "note", "1 of 13 .* row 13, '<end>', which is encoded as 5 ordinary"),
        (
            tokens.special_tokens, "sft", SPELT, {"special_tokens_in_data": True}, "warning",
            "'<end>', which becomes the token 1",
        ),
        (rows.unusable_rows, "sft", EMPTY, {}, "warning", r"1 of 13 .*: 1 empty response \(first: row 13\)"),
        (rows.truncation, "sft", LONG, {}, "warning", "1 of 13 .* cut to --max_length 64"),
        (rows.prompt_window, "ppo", None, {"max_length": 24}, "warning", "prompts are longer than 16 tokens"),
        (rows.duplicates, "sft", TWICE, {"eval_size": 0}, "warning", r"3 of 15 .*; row 1 is there 2 x"),
        (rows.held_out, "sft", None, {"eval_size": 0}, "warning", "no row is held out"),
        (rows.held_out, "reward", None, {}, "note", "1 pairs are held out"),
        (rows.steps, "sft", None, {"batch_size": 32}, "warning", "of 32 over 11 training rows"),
        (rows.steps, "ppo", None, {"batch_size": 8}, "note", "2 steps of 8"),
        (pairs.length_bias, "reward", LONGER, {}, "warning", r"in 100.0% of 60 pairs \(95% interval 94.0% to 100.0%\)"),
        (pairs.label_agreement, "reward", BOTH, {}, "warning", "1 pairs of 13 .* rows 4 and 13 prefer opposite sides"),
        (pairs.equal_sides, "dpo", SAME, {}, "warning", "2 of 14 .* pairs have equal sides, 1 of them once cut"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_a_defect_is_found(data_of, check, stage, made, settings, level, said):
    found = check(data_of(stage, made, **settings))
    assert found.level == level and found.why and found.change
    assert re.search(said, found.found), found.found


def test_trained_tokens_are_shown_and_a_row_without_prompt_is_an_error(data_of):
    data = data_of("sft", eval_size=0)
    assert "9 of 16 tokens are trained on, 'answer 0<end>'" in tokens.trained_tokens(data).found
    data.rows[0] = SFTRow(7, [5, 6, 1], [1, 1, 1], "key")
    found = tokens.trained_tokens(data)
    assert found.level == "error" and "row 7: every token is trained on" in found.found


def test_pad_that_is_eos_is_an_error_and_a_changed_pad_is_said(data_of):
    data = data_of("sft")
    data.tokenizer.pad_token = data.tokenizer.eos_token
    found = tokens.pad_and_eos(data)
    assert found.level == "error" and "PAD is '<end>' (id 1), EOS is '<end>' (id 1)" in found.found
    data.tokenizer.pad_token = "<pad>"
    data.tokenizer_notes.append("there was no PAD, EOS is '<end>': PAD is now '<pad>' (id 0), a special token")
    assert tokens.pad_and_eos(data).level == "note"


def test_held_out_prompts_that_are_trained_on_are_found(data_of, tmp_path):
    held_out = [
        {"messages": chat(text) + chat("a", "assistant")} for text in ("q3", "Q4  and so on", "other", "another")
    ]
    write_jsonl(tmp_path / "eval.jsonl", held_out)
    data = data_of("sft", eval_dataset_name=str(tmp_path / "eval.jsonl"))
    found = rows.leakage(data)
    assert found.level == "warning" and "1 of 4 (25.0%) held-out rows have a prompt" in found.found
    assert "1 of 4 (25.0%) have one that differs from a trained one in case" in found.found
    assert [row.index for row in data.leaked] == [1]


def test_of_large_data_the_first_rows_are_looked_at(data_of, monkeypatch):
    monkeypatch.setattr(subject, "ALWAYS", 6)
    monkeypatch.setattr(subject, "TRIAL", 4)
    monkeypatch.setattr(subject, "SECONDS", 0.0)
    data = data_of("sft")
    assert (data.seen, data.total, len(data.rows) + len(data.held_out)) == (6, 12, 6)
    assert rows.duplicates(data).found.endswith("(of the first 6 rows of 12)")
    assert data.steps() == 5  # of the 10 rows that a whole reading would train on, twice
