"""Column formats to one shape: a prompt and its responses, each a string or a list of chat turns.

Formats: ``messages``; ``prompt``/``completion``; ``prompt``/``chosen``/``rejected``; ``chosen``/``rejected`` alone, as
chat lists or as HH-RLHF transcripts ("\\n\\nHuman:" and "\\n\\nAssistant:"); ``prompt`` alone. A row with nothing
to learn from is dropped and counted; a row of the wrong structure is an error that names it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets

from rlhf_fast.data.report import DataReport
from rlhf_fast.errors import UserError, nearest

Turn = dict[str, str]
Text = str | list[Turn]

ROLES = ("system", "user", "assistant")
FORMAT_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")
HH_MARK = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}

EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
SAME_SIDES = "chosen and rejected are the same"
NO_COMMON_PROMPT = "chosen and rejected share no prompt"


@dataclass(frozen=True, slots=True)
class Example:
    """One row. ``responses`` is () for prompts, (response,) for SFT, (chosen, rejected) for preferences.

    ``index`` is the row, counted from 1. ``transcript``: the turns come from an HH-RLHF transcript, and may be written
    as one where the tokenizer has no chat template. ``columns``: what else the row holds.
    """

    index: int
    prompt: Text
    responses: tuple[Text, ...] = ()
    transcript: bool = False
    columns: dict[str, Any] = field(default_factory=dict)


class _Drop(Exception):
    """This row teaches nothing, for the reason given: count it and go on."""


class _Wrong(Exception):
    """This row has the wrong structure: becomes a UserError that names the row."""


def sft_examples(dataset: datasets.Dataset, report: DataReport) -> Iterator[Example]:
    """From ``messages``, ``prompt``/``completion``, or the chosen side of a preference format.

    Of ``messages`` the prompt is what stands before the first assistant turn: every assistant turn is trained on.
    """
    columns = dataset.column_names
    if "messages" in columns:
        return _examples(dataset, report, lambda row: _sft(_split_first(_turns(row["messages"], "messages"))))
    if "prompt" in columns and "completion" in columns:
        return _examples(dataset, report, lambda row: _sft(_two_columns(row, "completion")))
    if "chosen" in columns:
        return _examples(dataset, report, lambda row: _sft(_side(row, "chosen")))
    raise _missing(report, columns, "messages, or prompt and completion, or chosen (and rejected)")


def preference_examples(dataset: datasets.Dataset, report: DataReport) -> Iterator[Example]:
    """From ``chosen`` and ``rejected``, with a ``prompt`` or with the turns that both begin with as the prompt.

    A chat list that begins with another role than the assistant is the whole conversation: the prompt is taken from
    it and not from the ``prompt`` column. An optional ``margin`` (a number) is kept in ``columns``.
    """
    columns = dataset.column_names
    if "chosen" not in columns or "rejected" not in columns:
        raise _missing(report, columns, "chosen and rejected (with or without prompt)")
    return _examples(dataset, report, _pair)


def prompt_examples(dataset: datasets.Dataset, report: DataReport) -> Iterator[Example]:
    """From any format: ``prompt`` as it is, else the conversation before its last assistant turn.

    The format's own columns are left out of ``columns``; all others are kept for reward functions.
    """
    columns = dataset.column_names
    source = next((name for name in ("prompt", "messages", "chosen") if name in columns), None)
    if source is None:
        raise _missing(report, columns, "prompt, or messages, or chosen")
    return _examples(dataset, report, lambda row: _prompt(row, source))


def _examples(
    dataset: datasets.Dataset, report: DataReport, read: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[Example]:
    for index, row in enumerate(dataset, start=1):
        try:
            example = Example(index=index, **read(row))
            if _empty_prompt(example.prompt):
                raise _Drop(EMPTY_PROMPT)
            if any(_empty_response(response) for response in example.responses):
                raise _Drop(EMPTY_RESPONSE)
        except _Drop as reason:
            report.drop(str(reason), index)
        except _Wrong as fault:
            raise UserError(f"{report.source}, row {index}: {fault}") from fault
        else:
            yield example


def _missing(report: DataReport, columns: list[str], needed: str) -> UserError:
    unknown = [column for column in columns if column not in FORMAT_COLUMNS]
    meant = [f"{column!r}{close}" for column in unknown if (close := nearest(column, list(FORMAT_COLUMNS)))]
    hint = f"; {', '.join(meant)}" if meant else ""
    return UserError(f"{report.source}: expected the columns {needed}; found {columns}{hint}; rename columns to match")


# One row to the fields of an Example.


def _sft(read: tuple[Text, Text, bool]) -> dict[str, Any]:
    prompt, response, transcript = read
    return {"prompt": prompt, "responses": (response,), "transcript": transcript}


def _prompt(row: dict[str, Any], source: str) -> dict[str, Any]:
    columns = {name: value for name, value in row.items() if name not in FORMAT_COLUMNS}
    if source == "prompt":
        prompt, transcript = _text(row["prompt"], "prompt"), False
        if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
            raise _Wrong("the prompt ends with an assistant turn; expected it to end with a user turn")
    else:
        turns, transcript = _conversation(row[source], source)
        prompt = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    return {"prompt": prompt, "transcript": transcript, "columns": columns}


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    transcript = False
    if _whole_conversation(row, "chosen"):
        chosen, transcript = _conversation(row["chosen"], "chosen")
        rejected, _ = _conversation(row["rejected"], "rejected")
        _require_response(chosen, "chosen")
        _require_response(rejected, "rejected")
        if chosen == rejected:
            raise _Drop(SAME_SIDES)
        shared = _shared_prompt(chosen, rejected)
        prompt: Text = chosen[:shared]
        responses: tuple[Text, Text] = (chosen[shared:], rejected[shared:])
    else:
        prompt, first, _ = _two_columns(row, "chosen")
        responses = (first, _two_columns(row, "rejected")[1])
        if responses[0] == responses[1]:
            raise _Drop(SAME_SIDES)
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise _Wrong(f"margin must be a number, got {type(margin).__name__} {margin!r}")
    return {"prompt": prompt, "responses": responses, "transcript": transcript, "columns": {"margin": margin}}


def _side(row: dict[str, Any], column: str) -> tuple[Text, Text, bool]:
    if not _whole_conversation(row, column):
        return _two_columns(row, column)
    turns, transcript = _conversation(row[column], column)
    _require_response(turns, column)
    return turns[:-1], turns[-1:], transcript


def _whole_conversation(row: dict[str, Any], column: str) -> bool:
    """Whether the column holds the prompt too, rather than a response alone."""
    value = row[column]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return value[0].get("role") != "assistant"
    return "prompt" not in row


def _two_columns(row: dict[str, Any], column: str) -> tuple[Text, Text, bool]:
    prompt, response = _text(row["prompt"], "prompt"), _text(row[column], column)
    if not prompt:
        raise _Drop(EMPTY_PROMPT)
    if not response:
        raise _Drop(EMPTY_RESPONSE)
    if isinstance(prompt, str) != isinstance(response, str):
        kinds = [("a string" if isinstance(text, str) else "a chat list") for text in (prompt, response)]
        raise _Wrong(f"prompt is {kinds[0]} and {column} {kinds[1]}; expected both strings or both chat lists")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise _Wrong("the prompt ends with an assistant turn; expected it to end with a user turn")
    if isinstance(response, list):
        _require_response(response, column)
        if response[0]["role"] != "assistant":
            role = response[0]["role"]
            raise _Wrong(f"{column} begins with a turn of the {role}; expected the assistant's, as there is a prompt")
    return prompt, response, False


def _shared_prompt(chosen: list[Turn], rejected: list[Turn]) -> int:
    """How many turns both sides begin with, ending where both answer."""
    shared = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        shared += 1
    sides = (chosen, rejected)
    for length in range(shared, 0, -1):
        if all(length < len(side) and side[length]["role"] == "assistant" for side in sides):
            return length
    raise _Drop(NO_COMMON_PROMPT)


def _split_first(turns: list[Turn]) -> tuple[Text, Text, bool]:
    _require_response(turns, "messages")
    first = next(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:first], turns[first:], False


def _require_response(turns: list[Turn], column: str) -> None:
    if not turns:
        raise _Drop(EMPTY_RESPONSE)
    if turns[-1]["role"] != "assistant":
        raise _Wrong(f"{column} ends with a turn of the {turns[-1]['role']}; expected the assistant's turn last")


# Values to strings and chat lists.


def _conversation(value: Any, column: str) -> tuple[list[Turn], bool]:
    """A whole conversation, and whether it came from a transcript. ``messages`` are never transcripts."""
    if isinstance(value, str) and value and column != "messages":
        return parse_transcript(value), True
    return _turns(value, column), False


def _text(value: Any, column: str) -> Text:
    if value is None:
        return ""
    if not isinstance(value, str | list):
        kind = type(value).__name__
        raise _Wrong(f"{column}: expected a string or a list of chat turns, got {kind} {value!r:.60}")
    return value if isinstance(value, str) else _turns(value, column)


def _turns(value: Any, column: str) -> list[Turn]:
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise _Wrong(f"{column}: expected a list of chat turns, got {type(value).__name__} {value!r:.60}")
    for turn in value:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise _Wrong(f"{column}: a turn must have 'role' and 'content', got {turn!r:.80}")
        if turn["role"] not in ROLES:
            hint = nearest(str(turn["role"]), list(ROLES))
            raise _Wrong(f"{column}: unknown role {turn['role']!r}{hint}; expected one of {', '.join(ROLES)}")
        if not isinstance(turn["content"], str):
            kind = type(turn["content"]).__name__
            raise _Wrong(f"{column}: the {turn['role']}'s content must be a string, got {kind} {turn['content']!r:.60}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _empty_prompt(prompt: Text) -> bool:
    if isinstance(prompt, str):
        return not prompt.strip()
    return not prompt or prompt[-1]["role"] == "system" or not prompt[-1]["content"].strip()


def _empty_response(response: Text) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return any(turn["role"] == "assistant" and not turn["content"].strip() for turn in response)


def parse_transcript(text: str) -> list[Turn]:
    """An HH-RLHF transcript as chat turns, each stripped.

    A turn that follows one of the same speaker is joined to it with a blank line: chat templates want roles in turn.
    """
    before, *parts = HH_MARK.split(text)
    if before.strip() or not parts:
        raise _Wrong(
            "expected a prompt column, a list of chat turns, or a transcript that begins with '\\n\\nHuman:', "
            f"got {text!r:.60}"
        )
    turns: list[Turn] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = HH_ROLES[speaker], said.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".strip()
        else:
            turns.append({"role": role, "content": content})
    return turns


def format_transcript(turns: list[Turn], *, answer_next: bool = False) -> str:
    """Chat turns as an HH-RLHF transcript; ``answer_next`` ends it with the mark after which the assistant speaks."""
    names = {role: speaker for speaker, role in HH_ROLES.items()}
    text = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
    return f"{text}\n\nAssistant:" if answer_next else text
