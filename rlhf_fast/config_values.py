"""A mapping from outside (YAML or flags) -> settings of a config class: every key known, every value of its type."""

import contextlib
import math
import types
import typing
from typing import Any

from rlhf_fast.errors import UserError, nearest
from rlhf_fast.text import one_line, shown

Settings = dict[str, Any]
LONGEST_NUMBER = 31  # digits


def field_kinds(config_class: type) -> dict[str, Any]:
    """Field name -> its type, in the order of the class."""
    return typing.get_type_hints(config_class)


def split_optional(kind: Any) -> tuple[Any, bool]:
    """`int | None` -> (int, True); `int` -> (int, False)."""
    if isinstance(kind, types.UnionType):
        return next(member for member in typing.get_args(kind) if member is not type(None)), True
    return kind, False


def read_settings(
    raw: Settings, kinds: dict[str, Any], prefix: str, section: str = "", others: list[str] | None = None
) -> Settings:
    """``raw`` with every key known and every value of its field's type.

    ``prefix`` ("FILE: " or "--") and ``section`` ("ppo." or "") make the key's name in messages; ``others`` are names
    beside ``kinds`` that a suggestion may name.
    """
    settings: Settings = {}
    for key, value in raw.items():
        name = one_line(f"{section}{key}", 200)
        if key not in kinds:
            names = [*(section + kind for kind in kinds), *(others or [])]
            if prefix == "--":
                raise UserError(f"unknown flag --{name}" + nearest(f"--{name}", [f"--{known}" for known in names]))
            raise UserError(f"{prefix}unknown key {name!r}" + nearest(name, names))
        kind, optional = split_optional(kinds[key])
        if optional and (value is None or (prefix == "--" and value == "null")):
            settings[key] = None
            continue
        try:
            settings[key] = convert(value, kind)
        except ValueError as error:
            expected = f"{error} or null" if optional else str(error)
            raise UserError(f"{prefix}{name} must be {expected}; got {show(value)}") from None
    return settings


def convert(value: Any, kind: Any) -> Any:
    """``value``, or the text of one, as ``kind``; ValueError says what was expected."""
    if kind is str:
        if isinstance(value, str) and "\0" not in value:
            return value
        if isinstance(value, str):
            raise ValueError("text without the character NUL")
        raise ValueError("text (in quotes where it looks like a number)")
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if kind in (int, float):
        return convert_number(value, kind)
    if kind == list[str]:
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return list(items)
        raise ValueError("a list of texts (as a flag: a,b)")
    if kind == list[float]:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, list):
            with contextlib.suppress(ValueError):
                return [convert_number(item, float) for item in items]
        raise ValueError("a list of finite numbers (as a flag: 1.0,0.5)")
    if kind == dict[str, str]:
        pairs = dict_of_text(value) if isinstance(value, str) else value
        if isinstance(pairs, dict) and all(isinstance(item, str) for pair in pairs.items() for item in pair):
            return dict(pairs)
        raise ValueError("a mapping of text to text (as a flag: old=new,old2=new2)")
    if kind == dict[str, float]:
        pairs = dict_of_text(value) if isinstance(value, str) else value
        if isinstance(pairs, dict) and all(isinstance(name, str) for name in pairs):
            with contextlib.suppress(ValueError):
                return {name: convert_number(number, float) for name, number in pairs.items()}
        raise ValueError("a mapping of names to finite numbers (as a flag: name=1.5,name2=2)")
    raise TypeError(f"a config field of type {kind}: teach convert() to read it")


def convert_number(value: Any, kind: type) -> Any:
    """YAML 1.1 takes `1e-4` (no dot) for text, and a flag is text always: so the text of a number is a number."""
    expected = "a whole number" if kind is int else "a number"
    accepted = (str, int) if kind is int else (str, int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ValueError(expected)
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise ValueError(expected) from None
    if kind is float and not math.isfinite(number):
        raise ValueError("a finite number")
    if kind is int and abs(number) >= 10**LONGEST_NUMBER:
        raise ValueError(f"a whole number of at most {LONGEST_NUMBER} digits")
    return number


def dict_of_text(text: str) -> dict[str, str] | None:
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    whole = all(old.strip() and equals and new.strip() for old, equals, new in pairs)
    return {old.strip(): new.strip() for old, _, new in pairs} if whole else None


def show(value: Any) -> str:
    return "null" if value is None else shown(value)
