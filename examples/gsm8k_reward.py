"""Rewards for GSM8K as plain Python functions: f(prompts, completions, **columns) -> one number a completion."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def solved(prompts: list, completions: list, answer: list[str]) -> list[float]:
    """1 where the number after the completion's last "####" is the data's, else 0."""
    return [
        float(value is not None and value == final_number(gold))
        for value, gold in zip(map(final_number, map(text, completions)), answer, strict=True)
    ]


def gives_answer(prompts: list, completions: list) -> list[float]:
    """0.2 for ending in the data's form, "#### 42": a first step that a small model can learn."""
    return [0.2 if final_number(text(completion)) is not None else 0.0 for completion in completions]


def final_number(solution: str) -> float | None:
    """The number after the last "####", as the data set marks answers; None where there is none."""
    _, mark, tail = solution.rpartition("####")
    found = NUMBER.match(tail.strip()) if mark else None
    return float(found.group().replace(",", "")) if found else None


def text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
