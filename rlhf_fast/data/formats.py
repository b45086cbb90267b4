"""Converts the columns of a row to a prompt and its responses, each a string or a list of chat turns.

Formats: ``messages``; ``prompt``/``completion``; ``prompt``/``chosen``/``rejected``; only ``chosen``/``rejected``, as
chat lists or as HH-RLHF transcripts ("\\n\\nHuman:" and "\\n\\nAssistant:"); only ``prompt``; ShareGPT's
``conversations`` and Alpaca's ``instruction``/``input``/``output``, with or without ``chosen``/``rejected``.

All stages find the same prompt in a row. A row with nothing to train on is dropped and counted; a row of the wrong
structure is rejected and counted (see DataReport).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf_fast.data.foreign import (
    FOREIGN_COLUMNS,
    assistant_turn,
    from_alpaca,
    known_columns,
    system_text,
    template_arguments,
)
from rlhf_fast.data.report import DataReport
from rlhf_fast.data.rows import Rows
from rlhf_fast.data.turns import Text, Turn, Wrong, is_transcript, parse_transcript, read_text, read_turns
from rlhf_fast.errors import UserError, nearest
from rlhf_fast.text import one_line, shown

Row = dict[str, Any]

FORMAT_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")

LARGEST_MARGIN = 1e12  # float32 holds its square

EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
NOT_TRAINED = "every answer has weight 0"
SAME_SIDES = "chosen and rejected are the same"
NO_COMMON_PROMPT = "chosen and rejected share no prompt"
SYSTEM_UNUSED = "rows have a system column, which prompts of plain text do not use"
SHORT = "rows have fewer fields than the header: the missing ones are empty"
CUT = "conversations go on after the assistant's last turn: cut there"


class Table(Protocol):
    """A table of rows with column names: ``Rows`` or datasets.Dataset."""

    @property
    def column_names(self) -> list[str]: ...

    def select(self, indices: Any) -> Any: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One row. ``responses`` is () for prompts, (response,) for SFT, (chosen, rejected) for preferences.

    ``index``: the row, counted from 1. ``transcript``: the turns come from an HH-RLHF transcript, and are written as
    one if the tokenizer has no chat template. ``joined``: the turns come from Alpaca's columns, and are then joined by
    blank lines. ``columns``: further columns of the row. ``template``: further arguments of the chat template
    (``tools``).
    """

    index: int
    prompt: Text
    responses: tuple[Text, ...] = ()
    transcript: bool = False
    joined: bool = False
    columns: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)


class _Drop(Exception):
    """The row has nothing to train on, for this reason; it is counted and skipped."""


@dataclass
class _Side:
    """A conversation up to and including the assistant's last turn; ``cut``: later turns were left out."""

    turns: list[Turn]
    transcript: bool = False
    cut: bool = False


def sft_examples(dataset: Table, report: DataReport) -> Iterator[Example]:
    """Examples from ``messages``, ``prompt``/``completion``, or the chosen side of a preference format.

    In ``messages``, the prompt is everything before the first answer; every assistant turn after it is trained on.
    """
    columns, known = known_columns(dataset.column_names)
    if "messages" in columns:
        read = _sft_messages
    elif "prompt" in columns and "completion" in columns:
        read = _sft_completion
    elif "chosen" in columns:
        read = _sft_chosen
    else:
        raise _missing(report, dataset.column_names, "messages, or prompt and completion, or chosen (and rejected)")
    return _examples(dataset, report, known, read)


def preference_examples(dataset: Table, report: DataReport) -> Iterator[Example]:
    """Examples from ``chosen`` and ``rejected``. The prompt is the ``prompt`` column or the common first turns.

    A chat list that does not begin with an assistant turn is a whole conversation: the prompt is taken from it, not
    from the ``prompt`` column. An optional ``margin`` (a number) and ``subset`` (a name) are kept in ``columns``.
    """
    columns, known = known_columns(dataset.column_names)
    if "chosen" not in columns or "rejected" not in columns:
        raise _missing(report, dataset.column_names, "chosen and rejected (with or without prompt)")
    return _examples(dataset, report, known, _pair)


def prompt_examples(dataset: Table, report: DataReport) -> Iterator[Example]:
    """The prompt of each row, found as in the other stages.

    ``columns`` has all columns except those of the format, for reward functions.
    """
    columns, known = known_columns(dataset.column_names)
    if not {"prompt", "messages", "chosen"} & set(columns):
        raise _missing(report, dataset.column_names, "prompt, or messages, or chosen")
    return _examples(dataset, report, known, _prompt)


def _examples(
    dataset: Table, report: DataReport, known: Callable[[Row], Row], read: Callable[[Row], dict[str, Any]]
) -> Iterator[Example]:
    report.total = len(dataset)
    if isinstance(dataset, Rows):
        report.total += len(dataset.faults)
        report.file_lines = dataset.lines
        for fault in dataset.faults:
            report.fault(fault)
        for line in dataset.short:
            report.note(SHORT, 0, f"line {line}")
    for index, row in enumerate(_rows(dataset), start=1):
        try:
            if isinstance(row, Wrong):
                raise row
            found = read(known(row))
            _add_system(found, row)
            notes: Iterable[str] = found.pop("notes")
            template = template_arguments(row) if isinstance(found["prompt"], list) else {}
            if read is _prompt:
                found["columns"] = {name: value for name, value in row.items() if name not in FORMAT_COLUMNS}
            example = Example(index=index, joined=known is from_alpaca, template=template, **found)
            if _empty_prompt(example.prompt):
                raise _Drop(EMPTY_PROMPT)
            if any(_empty_response(response) for response in example.responses):
                raise _Drop(EMPTY_RESPONSE)
        except _Drop as reason:
            report.drop(str(reason), index)
        except Wrong as fault:
            report.reject(fault.reason, index, fault.detail)
        else:
            for note in notes:
                report.note(note, index)
            yield example
    report.require_usable()


def _rows(dataset: Table) -> Iterator[Row | Wrong]:
    """Each row, or the reason why it cannot be read. Arrow's iterator ends at a value that it cannot convert to Python,
    so it is restarted after that row."""
    start, total = 0, len(dataset)
    while start < total:
        rest = dataset if start == 0 else dataset.select(range(start, total))
        try:
            for row in rest:
                yield row
                start += 1
        except (ValueError, OverflowError, TypeError, ImportError, OSError) as error:
            start += 1
            yield Wrong("a value that cannot be read", f" ({type(error).__name__}: {one_line(str(error), 80)})")


def _add_system(found: dict[str, Any], row: Row) -> None:
    """Adds the system column as the first turn of a chat without a system turn."""
    system = system_text(row)
    if system is None:
        return
    prompt = found["prompt"]
    if isinstance(prompt, str) or found["transcript"]:
        found["notes"] = (*found["notes"], SYSTEM_UNUSED)
    elif not any(turn["role"] == "system" for turn in prompt):
        found["prompt"] = [{"role": "system", "content": system}, *prompt]


def _missing(report: DataReport, columns: list[str], needed: str) -> UserError:
    known = [*FORMAT_COLUMNS, *FOREIGN_COLUMNS]
    unknown = [column for column in columns if column not in known]
    meant = [f"{column!r}{close}" for column in unknown if (close := nearest(column, known))]
    hint = f"; {', '.join(meant)}" if meant else ""
    return UserError(f"{report.source}: expected the columns {needed}; found {columns}{hint}; rename columns to match")


# ---- readers: a row to the fields of an Example


def _sft_messages(row: Row) -> dict[str, Any]:
    turns = read_turns(row["messages"], "messages")
    side = _answered(turns, "messages")
    # an assistant turn before the first user turn, such as a greeting, belongs to the prompt
    asked = next((place for place, turn in enumerate(side.turns) if turn["role"] == "user"), 0)
    answers = [place for place, turn in enumerate(side.turns) if turn["role"] == "assistant"]
    if all(side.turns[place].get("weight") == 0 for place in answers):
        raise _Drop(NOT_TRAINED)
    first = next((place for place in answers if place >= asked), answers[-1])
    return _found(side.turns[:first], side.turns[first:], cut=side.cut)


def _sft_completion(row: Row) -> dict[str, Any]:
    prompt, response, transcript = _two_columns(row, "completion")
    return _found(prompt, response, transcript=transcript)


def _sft_chosen(row: Row) -> dict[str, Any]:
    if not _is_conversation(row, "chosen"):
        prompt, response, transcript = _two_columns(row, "chosen")
        return _found(prompt, response, transcript=transcript)
    side = _conversation(row, "chosen")
    start = _shared(row, side)
    if start is None:
        start = len(side.turns) - 1
    return _found(side.turns[:start], side.turns[start:], transcript=side.transcript, cut=side.cut)


def _pair(row: Row) -> dict[str, Any]:
    if _is_conversation(row, "chosen"):
        chosen, rejected = _conversation(row, "chosen"), _conversation(row, "rejected")
        if chosen.turns == rejected.turns:
            raise _Drop(SAME_SIDES)
        shared = _shared_prompt(chosen.turns, rejected.turns)
        if shared is None:
            raise _Drop(NO_COMMON_PROMPT)
        sides = chosen.turns[shared:], rejected.turns[shared:]
        found = _found(chosen.turns[:shared], *sides, transcript=chosen.transcript, cut=chosen.cut or rejected.cut)
    else:
        prompt, first, transcript = _two_columns(row, "chosen")
        second = _two_columns(row, "rejected")[1]
        if first == second:
            raise _Drop(SAME_SIDES)
        found = _found(prompt, first, second, transcript=transcript)
    return {**found, "columns": {"margin": _margin(row.get("margin")), "subset": _subset(row.get("subset"))}}


def _margin(value: Any) -> float | None:
    """The margin as a number, also from text as in CSV; None if there is none."""
    if value is None or value == "":
        return None
    try:
        number = None if isinstance(value, bool | list | dict) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not abs(number) <= LARGEST_MARGIN:
        kind = type(value).__name__
        raise Wrong(f"margin must be a number, got {kind}", f" {shown(value)}; at most {LARGEST_MARGIN:g} in size")
    return value if isinstance(value, int) else number


def _subset(value: Any) -> str | None:
    """The name of a part of the data, as in RewardBench; None if there is none."""
    return None if value is None or value == "" else one_line(str(value), 80)


def _prompt(row: Row) -> dict[str, Any]:
    """The same prompt that SFT and reward training find in the row."""
    if row.get("chosen") and _is_conversation(row, "chosen"):
        side = _Side(*_read_conversation(row["chosen"], "chosen"))
        start = _shared(row, side)
        return _found(_context(side.turns) if start is None else side.turns[:start], transcript=side.transcript)
    if row.get("messages"):
        return _found(_context(read_turns(row["messages"], "messages")))
    for column in ("completion", "chosen"):
        if row.get(column):  # raises the same errors as the stage that trains on this column
            prompt, _, transcript = _two_columns(row, column)
            return _found(prompt, transcript=transcript)
    prompt, transcript = _prompt_column(row)
    return _found(prompt, transcript=transcript)


def _found(prompt: Text, *responses: Text, transcript: bool = False, cut: bool = False) -> dict[str, Any]:
    return {"prompt": prompt, "responses": responses, "transcript": transcript, "notes": (CUT,) if cut else ()}


def _prompt_column(row: Row) -> tuple[Text, bool]:
    value = row.get("prompt")
    transcript = is_transcript(value)
    prompt = parse_transcript(value) if transcript else read_text(value, "prompt")  # type: ignore[arg-type]
    if transcript and isinstance(prompt, list) and prompt[-1] == assistant_turn(""):
        prompt = prompt[:-1]
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        raise Wrong("the prompt ends with an assistant turn; expected it to end with a user turn")
    return prompt, transcript


def _two_columns(row: Row, column: str) -> tuple[Text, Text, bool]:
    (prompt, transcript), response = _prompt_column(row), read_text(row[column], column)
    if not prompt:
        raise _Drop(EMPTY_PROMPT)
    if not response:
        raise _Drop(EMPTY_RESPONSE)
    if transcript and isinstance(response, str):
        return prompt, [assistant_turn(response.strip())], True
    if isinstance(prompt, str) != isinstance(response, str):
        kinds = [("a string" if isinstance(text, str) else "a chat list") for text in (prompt, response)]
        raise Wrong(f"prompt is {kinds[0]} and {column} {kinds[1]}; expected both strings or both chat lists")
    if isinstance(response, list):
        side = _answered(response, column)
        if response[0]["role"] != "assistant":
            role = response[0]["role"]
            raise Wrong(f"{column} begins with a turn of the {role}; expected the assistant's, as there is a prompt")
        response = side.turns
    return prompt, response, transcript


# ---- whole conversations


def _is_conversation(row: Row, column: str) -> bool:
    """Whether the column has prompt and response, not only a response."""
    value = row.get(column)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return read_turns(value[:1], column)[0]["role"] != "assistant"
    return is_transcript(value) or "prompt" not in row


def _read_conversation(value: Any, column: str) -> tuple[list[Turn], bool]:
    """The turns, and whether they come from a transcript."""
    if isinstance(value, str) and value:
        return parse_transcript(value), True
    return read_turns(value, column), False


def _conversation(row: Row, column: str) -> _Side:
    turns, transcript = _read_conversation(row.get(column), column)
    side = _answered(turns, column)
    return _Side(side.turns, transcript, side.cut)


def _answered(turns: list[Turn], column: str) -> _Side:
    """The turns up to and including the assistant's last one."""
    if not turns:
        raise _Drop(EMPTY_RESPONSE)
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise Wrong(f"{column} ends with a turn of the {turns[-1]['role']}; expected the assistant's turn last")
    return _Side(turns[: last + 1], cut=last + 1 < len(turns))


def _context(turns: list[Turn]) -> list[Turn]:
    """The turns without a final assistant turn: the prompt for a new answer."""
    return turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns


def _shared(row: Row, chosen: _Side) -> int | None:
    """The number of prompt turns of a preference row; None if it has no rejected conversation to compare with."""
    if not row.get("rejected") or not _is_conversation(row, "rejected"):
        return None
    return _shared_prompt(chosen.turns, _read_conversation(row["rejected"], "rejected")[0])


def _shared_prompt(chosen: list[Turn], rejected: list[Turn]) -> int | None:
    """The number of common first turns of both sides, such that an assistant turn follows in both; None if none."""
    shared = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        shared += 1
    sides = (chosen, rejected)
    for length in range(shared, 0, -1):
        if all(length < len(side) and side[length]["role"] == "assistant" for side in sides):
            return length
    return None


def _empty_prompt(prompt: Text) -> bool:
    if isinstance(prompt, str):
        return not prompt.strip()
    asked = [turn["content"] for turn in prompt if turn["role"] == "user"]
    return not asked or not asked[-1].strip()


def _empty_response(response: Text) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return any(
        turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls") for turn in response
    )
