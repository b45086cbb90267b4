"""What the two recipes that train on preference pairs share: lengths, and the figures of held-out pairs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlhf_fast.data import PairRow
from rlhf_fast.rewards.quality import Quality


def pair_lengths(rows: Sequence[PairRow]) -> list[int]:
    """The length of each sequence: both sides of a pair are rows of one batch."""
    return [len(ids) for row in rows for ids in (row.chosen_ids, row.rejected_ids)]


def both_lengths(rows: Sequence[PairRow]) -> list[int]:
    """The length of each pair, both sides together."""
    return [len(row.chosen_ids) + len(row.rejected_ids) for row in rows]


def length_difference(row: PairRow) -> int:
    """Tokens by which the chosen response is longer."""
    return row.chosen_response_length - row.rejected_response_length


def quality_figures(quality: Quality) -> dict[str, Any]:
    """The figures of held-out pairs for ``summary.json``."""
    figures = {name: value for name, value in asdict(quality).items() if not name.startswith("accuracy")}
    figures["accuracy"] = {
        "value": quality.accuracy,
        "low": quality.accuracy_low,
        "high": quality.accuracy_high,
        "note": f"{quality.pairs} held-out pairs",
    }
    return figures


def quality_rows(quality: Quality, guessing: str, ceiling: float | None = None) -> list[tuple[str, str, str]]:
    """The same figures as rows of the final table. ``guessing``: a note on the loss of a model that knows nothing.
    ``ceiling``: the best accuracy that the labels' noise allows."""
    interval = f"95% interval {quality.accuracy_low:.1%} to {quality.accuracy_high:.1%}, {quality.pairs} pairs"
    if ceiling is not None:
        interval += f"; label noise caps it at {ceiling:.1%}"
    return [
        ("held-out accuracy", f"{quality.accuracy:.1%}", interval),
        ("held-out loss", f"{quality.loss:.4f}", guessing),
        ("margin", f"{quality.margin:.3f}", "mean of chosen minus rejected"),
        ("calibration error", f"{quality.calibration_error:.3f}", "expected, of the predicted probability"),
        ("length correlation", f"{quality.length_correlation:+.2f}", f"length alone: {quality.length_accuracy:.1%}"),
    ]
