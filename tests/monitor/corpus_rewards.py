"""Rewards of the recorded runs: some can be learnt, some exploited, one says nothing."""

from collections.abc import Callable, Sequence
from typing import Any

Reward = Callable[..., list[float]]


def of_text(score: Callable[[str], float]) -> Reward:
    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [score(text if isinstance(text, str) else text[-1]["content"]) for text in completions]

    return reward


def share(text: str, wanted: Callable[[str], bool]) -> float:
    return sum(map(wanted, text)) / max(len(text), 1)


letters = of_text(lambda text: 4 * share(text, lambda c: c.isascii() and (c.isalpha() or c == " ")))
vowels = of_text(lambda text: 4 * share(text, lambda c: c in "aeiouAEIOU"))
one_letter = of_text(lambda text: 6 * share(text, lambda c: c == "e"))
variety = of_text(lambda text: 4 * len(set(text)) / max(len(text), 1))
length = of_text(lambda text: len(text) / 20)
brevity = of_text(lambda text: -len(text) / 20)
the = of_text(lambda text: 8 * text.lower().split().count("the") / max(len(text.split()), 1))
constant = of_text(lambda text: 1.0)
