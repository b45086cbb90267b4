"""Converts the columns of ShareGPT, Alpaca and Dolly to this project's, and reads system prompts and tools."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_fast.data.turns import Turn, Wrong, read_turns, without_none
from rlhf_fast.text import shown

Row = dict[str, Any]

FOREIGN_COLUMNS = ("conversations", "instruction")
SYSTEM_COLUMNS = ("system", "system_prompt")
# Names of the same column in Alpaca, Dolly and others.
INPUT_COLUMNS, OUTPUT_COLUMNS = ("input", "context"), ("output", "response", "completion")


def known_columns(names: Sequence[str]) -> tuple[list[str], Callable[[Row], Row]]:
    """The column names after conversion from ShareGPT's or Alpaca's, and the function that converts a row."""
    columns = list(names)
    if "messages" not in columns and "conversations" in columns:
        target = "prompt" if "chosen" in columns else "messages"
        return [*columns, target], lambda row: {**row, target: read_turns(row["conversations"], "conversations")}
    if not {"messages", "prompt"} & set(columns) and "instruction" in columns:
        output = next((name for name in OUTPUT_COLUMNS if name in columns), None)
        return [*columns, "prompt", *(["completion"] if output else [])], from_alpaca
    return columns, lambda row: row


def from_alpaca(row: Row) -> Row:
    """Converts a row of Alpaca or Dolly. ``history``, of later Alpaca formats, has pairs of question and answer."""
    turns: list[Turn] = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Wrong("history: expected pairs of question and answer", f", got {shown(pair)}")
        turns += [user_turn(_words(pair[0], "history")), assistant_turn(_words(pair[1], "history"))]
    given = next((name for name in INPUT_COLUMNS if row.get(name)), "input")
    asked = [_words(row.get(name), name) for name in ("instruction", given)]
    made: Row = {"prompt": [*turns, user_turn("\n\n".join(text for text in asked if text.strip()))]}
    output = next((name for name in OUTPUT_COLUMNS if name in row), None)
    if output is not None:
        made["completion"] = [assistant_turn(_words(row[output], output))]
    for side in ("chosen", "rejected"):
        if isinstance(row.get(side), str):
            made[side] = [assistant_turn(row[side])]
    return {**row, **made}


def _words(value: Any, column: str) -> str:
    if not isinstance(value, str | None):
        raise Wrong(f"{column}: expected text, got {type(value).__name__}", f" {shown(value)}")
    return value or ""


def user_turn(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant_turn(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def template_arguments(row: Row) -> dict[str, Any]:
    """Arguments for the chat template from the columns ``tools`` (a list, or its JSON text) and
    ``chat_template_kwargs``, which TRL and transformers use."""
    arguments = row.get("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, dict):
        raise Wrong("chat_template_kwargs: expected a mapping", f", got {shown(arguments)}")
    found = without_none(arguments or {})
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "tools")
    if tools:
        if not isinstance(tools, list):
            raise Wrong("tools: expected a list of function descriptions", f", got {shown(tools)}")
        found["tools"] = without_none([_json(tool, "tools") if isinstance(tool, str) else tool for tool in tools])
    return found


def _json(text: str, column: str) -> Any:

    try:
        return json.loads(text)
    except ValueError as error:
        raise Wrong(f"{column}: expected JSON", f", got {shown(text)}") from error


def system_text(row: Row) -> str | None:
    """The text of a ``system`` or ``system_prompt`` column."""
    return next((row[name] for name in SYSTEM_COLUMNS if isinstance(row.get(name), str) and row[name].strip()), None)
