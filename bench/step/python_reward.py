"""The reward of the bench of learning: ten times the share of vowels among a response's letters, less 4, so that it is
about 0 for English text."""

from typing import Any


def score(completions: list[str], **_: Any) -> list[float]:
    return [10 * share(completion.lower()) - 4 for completion in completions]


def share(text: str) -> float:
    letters = sum(character.isalpha() for character in text)
    return sum(character in "aeiou" for character in text) / max(1, letters)
