"""The reward of the bench of learning: ten times the share of a response's words that have at most three letters, less
4, which brings the rewards near 0."""

import re
from typing import Any

WORD = re.compile(r"[^\W\d_]+")


def score(completions: list[str], **_: Any) -> list[float]:
    return [10 * share_of_short(WORD.findall(completion)) - 4 for completion in completions]


def share_of_short(words: list[str]) -> float:
    return sum(len(word) <= 3 for word in words) / max(1, len(words))
