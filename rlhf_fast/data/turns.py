"""Normalises chat turns to ``{"role": ..., "content": text}`` and further keys that a template may use.

Accepts turns of OpenAI and Hugging Face (``role``, ``content``; the content is text, a list of text parts, or None with
tool calls), of ShareGPT (``from``, ``value``), and HH-RLHF transcripts.
"""

import json
import re
from typing import Any

from rlhf_fast.errors import nearest
from rlhf_fast.text import shown

Turn = dict[str, Any]
Text = str | list[Turn]

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "bot", "chatbot", "chatgpt", "model", "function_call")},
    **{name: "tool" for name in ("tool", "function", "observation", "function_response", "ipython")},
}
# Further keys of a turn that a chat template may read.
FURTHER_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")

HH_MARK = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class Wrong(Exception):
    """A row of the wrong structure. ``detail``, which differs from row to row, continues ``reason``."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason, self.detail = reason, detail


def read_text(value: Any, column: str) -> Text:
    """A string unchanged; a list of turns, or one turn, as normalised turns; None as the empty string."""
    if value is None:
        return ""
    if not isinstance(value, str | list | dict):
        raise Wrong(f"{column}: expected a string or a list of chat turns, got {_kind(value)}", f" {shown(value)}")
    return value if isinstance(value, str) else read_turns(value, column)


def read_turns(value: Any, column: str) -> list[Turn]:
    """A list of turns, or one turn. Raises Wrong."""
    if value is None or value == "":
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Wrong(f"{column}: expected a list of chat turns, got {_kind(value)}", f" {shown(value)}")
    return [_turn(item, column) for item in value]


def _turn(item: Any, column: str) -> Turn:
    if isinstance(item, dict) and {"from", "value"} <= item.keys() and item.get("role") is None:
        item = {**item, "role": item["from"], "content": item["value"]}
    if not isinstance(item, dict) or not (
        "role" in item and ("content" in item or item.get("tool_calls") or item.get("function_call"))
    ):
        raise Wrong(f"{column}: a turn must have 'role' and 'content' (or 'from' and 'value')", f", got {shown(item)}")
    name = item["role"]
    role = ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        hint = nearest(str(name), list(ROLES))
        raise Wrong(f"{column}: unknown role", f" {shown(name)}{hint}; expected one of {', '.join(ROLES)}")
    turn: Turn = {"role": role, "content": _content(item.get("content"), role, column)}
    turn |= {key: item[key] for key in FURTHER_KEYS if item.get(key) not in (None, "", [])}
    if role == "assistant" and item.get("weight") == 0:  # in OpenAI's format: do not train on this turn
        turn["weight"] = 0
    if item.get("function_call"):  # OpenAI's deprecated form of a tool call
        turn.setdefault("tool_calls", [{"type": "function", "function": item["function_call"]}])
    if "tool_calls" in turn:
        turn["tool_calls"] = without_none([_read_arguments(call) for call in _listed(turn["tool_calls"])])
    return turn


def _content(value: Any, role: str, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str | dict) for part in value):
        return "".join(_part(part, role, column) for part in value)
    if isinstance(value, str):
        return value
    if role == "tool":  # the return value of a function, as JSON
        return json.dumps(without_none(value), ensure_ascii=False, default=str)
    raise Wrong(f"{column}: the {role}'s content must be a string, got {_kind(value)}", f" {shown(value)}")


def _part(part: str | dict[str, Any], role: str, column: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") or ("text" if "text" in part else "unknown")
    text = part.get("text")
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise Wrong(f"{column}: the {role}'s content must be text", f", got a part of type {shown(kind)}")
    return text


def _read_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object: OpenAI writes them as JSON text, but templates expect an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return call  # not JSON: passed to the template unchanged
        if isinstance(arguments, dict):
            function = {**function, "arguments": arguments}
            return {**call, "function": function} if "function" in call else function
    return call


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def without_none(value: Any) -> Any:
    """``value`` without keys whose value is None. Arrow adds them to rows that lack a key of other rows."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return type(value).__name__


def is_transcript(value: Any) -> bool:
    return isinstance(value, str) and HH_MARK.match(value) is not None


def parse_transcript(text: str) -> list[Turn]:
    """An HH-RLHF transcript as chat turns, each stripped.

    Consecutive turns of one speaker are joined with a blank line, because chat templates expect alternating roles.
    """
    before, *parts = HH_MARK.split(text)
    if before.strip() or not parts:
        raise Wrong(
            "expected a prompt column, a list of chat turns, or a transcript that begins with '\\n\\nHuman:'",
            f", got {shown(text)}",
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
    """Chat turns as an HH-RLHF transcript; ``answer_next`` appends the mark that begins the assistant's answer."""
    names = {role: speaker for speaker, role in HH_ROLES.items()}
    text = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
    return f"{text}\n\nAssistant:" if answer_next else text
