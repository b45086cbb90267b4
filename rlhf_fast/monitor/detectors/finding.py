"""What a detector finds, and the keys by which the samples that show it are sorted."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_fast.monitor.history import Row


@dataclass(frozen=True)
class Finding:
    """The signs of one verdict at one step.

    ``since``: the first step at which they stand. ``size``: how far past the threshold, 1 at it. ``worst``: the key by
    which the samples that show it are sorted, highest first; -inf for a sample that cannot show it.
    """

    since: int
    size: float
    metrics: Sequence[str]
    reason: str
    worst: Callable[[Row], float]


def score_of(row: Row) -> float:
    return _number(row.get("score"))


def distance_of_score(row: Row) -> float:
    """The score's distance from 0."""
    score = score_of(row)
    return abs(score) if math.isfinite(score) else score


def negative_kl_of(row: Row) -> float:
    kl = kl_of(row)
    return -kl if math.isfinite(kl) else kl


def kl_of(row: Row) -> float:
    return _number(row.get("kl"))


def length_of(row: Row) -> float:
    return _number(row.get("length", len(str(row.get("response", "")))))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else -math.inf


def in_words(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
