"""Rewards of the recorded runs: some can be learnt, some exploited, one says nothing."""

from collections.abc import Sequence
from typing import Any

VOWELS = frozenset("aeiouAEIOU")


def letters(completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of letters and blanks, times 4: what a random model can learn without repeating itself."""
    return [
        4 * sum(c.isascii() and (c.isalpha() or c == " ") for c in text) / max(len(text), 1) for text in completions
    ]


def vowels(completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of vowels, times 4: can be exploited by saying one of them again and again."""
    return [4 * sum(c in VOWELS for c in text) / max(len(text), 1) for text in completions]


def one_letter(completions: Sequence[str], **columns: Any) -> list[float]:
    return [6 * text.count("e") / max(len(text), 1) for text in completions]


def variety(completions: Sequence[str], **columns: Any) -> list[float]:
    """Gold: share of distinct characters."""
    return [4 * len(set(text)) / max(len(text), 1) for text in completions]


def length(completions: Sequence[str], **columns: Any) -> list[float]:
    return [len(text) / 20 for text in completions]


def brevity(completions: Sequence[str], **columns: Any) -> list[float]:
    """Gold beside ``length``."""
    return [-len(text) / 20 for text in completions]


def constant(completions: Sequence[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)
