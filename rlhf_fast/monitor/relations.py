"""Charts of how two things relate: score to KL, the trained score to the gold score, predicted chances to what was
observed; and histograms of the held-out responses."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_fast import metrics
from rlhf_fast.monitor.drawings import Drawing, Series, bars, dots, histogram, lines, spread
from rlhf_fast.monitor.numbers import format_number, number
from rlhf_fast.monitor.runs import Row, Stage

Dot = tuple[float, float, float]


def relations(stages: Sequence[Stage]) -> Iterator[tuple[Drawing, str]]:
    """The charts that have data, each with the sentence that says what good looks like."""
    name = stages[0].name
    if name == "ppo":
        yield from _score_against_kl(stages)
        yield from _proxy_against_gold(stages)
        for key, title, x, whole in (
            ("score", "Scores of held-out responses", "score", False),
            ("length", "Lengths of held-out responses", "length (tokens)", True),
        ):
            yield from _histogram(stages, key, title, x, whole)
    yield from _reliability(stages)
    if not stages[0].mark:
        yield from _margins(stages[0])


def _score_against_kl(stages: Sequence[Stage]) -> Iterator[tuple[Drawing, str]]:
    series, frontiers = [], []
    for stage in stages:
        found = _pairs(stage.metrics, metrics.KL.name, metrics.SCORES.name)
        if len(found) < 2:
            continue
        label = stage.mark or "a step"
        series.append(Series(label, spread(found), stage.place, stage.place, stage.mark))
        frontiers.append(
            Series(f"{stage.mark} best score so far".strip(), _frontier(found), stage.place, stage.place, stage.mark)
        )
    if series:
        reading = (
            "Higher and further to the left is better: more score for less distance from the reference. Later steps "
            "are stronger; the stairs are the best score up to each KL."
        )
        x, y = "KL (nats per response)", "mean score"
        yield dots("Score against KL", series, x=x, y=y, third="step", frontiers=frontiers), reading


def _frontier(points: Sequence[Dot]) -> list[tuple[float, float]]:
    """The corners of the stairs: the best score among the points up to each KL."""
    corners: list[tuple[float, float]] = []
    for kl, score, _ in sorted(points):
        if not corners or score > corners[-1][1]:
            corners.append((kl, score))
    corners.append((max(point[0] for point in points), corners[-1][1]))
    return spread(corners)


def _proxy_against_gold(stages: Sequence[Stage]) -> Iterator[tuple[Drawing, str]]:
    logged = {key for stage in stages for row in stage.metrics for key in row}
    for name in sorted(name for key in logged if (name := metrics.EVAL_FUNCTION.named_by(key))):
        gold = metrics.EVAL_FUNCTION.of(name).name
        if gold == metrics.EVAL_SCORES.name:
            continue
        series = []
        for stage in stages:
            found = _pairs(stage.metrics, metrics.EVAL_SCORES.name, gold)
            if len(found) >= 2:
                series.append(
                    Series(stage.mark or "an evaluation", spread(found), stage.place, stage.place, stage.mark)
                )
        if series:
            reading = (
                "A dot an evaluation, joined in time. Up and to the right is real gain; to the right and down, the "
                "trained score rises while what is wanted falls: reward hacking."
            )
            title = f"Trained score against {name}"
            x, y = "score that is trained on", f"{name} score"
            yield dots(title, series, x=x, y=y, third="step", joined=True), reading


def _pairs(rows: Sequence[Row], x: str, y: str) -> list[Dot]:
    """(x, y, step) of the lines that have both."""
    return [
        (at, value, row["step"])
        for row in rows
        if (at := number(row.get(x))) is not None and (value := number(row.get(y))) is not None
    ]


def _histogram(stages: Sequence[Stage], key: str, title: str, x: str, whole: bool) -> Iterator[tuple[Drawing, str]]:
    """First against last evaluation; of several runs, the last of each."""
    groups: list[tuple[str, int, list[float]]] = []  # label, colour, values
    for stage in stages:
        rows = [row for row in stage.samples if row.get("split") == "eval" and number(row.get(key)) is not None]
        steps = sorted({row["step"] for row in rows})
        for step in dict.fromkeys(steps[-1:] if stage.mark else steps[:1] + steps[-1:]):
            label = f"{stage.mark} step {step:,}".strip()
            groups.append(
                (
                    label,
                    stage.place if stage.mark else len(groups),
                    [float(row[key]) for row in rows if row["step"] == step],
                )
            )
    if groups:
        outlines = histogram([values for _, _, values in groups], whole=whole)
        series = [
            Series(label, outline, place, place) for (label, place, _), outline in zip(groups, outlines, strict=True)
        ]
        reading = {
            "score": "Moves to the right as a whole; a second hill or a spike at the top can be a trick that pays.",
            "length": "Keeps its shape; a move to the right is length being rewarded, a spike at its end truncation.",
        }[key]
        yield lines(title, series, x=x, y="share of responses", steps=True), reading


def _reliability(stages: Sequence[Stage]) -> Iterator[tuple[Drawing, str]]:
    series = []
    for stage in stages:
        points = [
            (predicted, observed, float(entry.get("count") or 0))
            for entry in stage.summary.get("reliability") or []
            if (predicted := number(entry.get("predicted"))) is not None
            and (observed := number(entry.get("observed"))) is not None
        ]
        if points:
            series.append(Series(stage.mark or "pairs", points, stage.place, stage.place, stage.mark))
    if series:
        reading = (
            "Dots on the dashed diagonal mean that a stated 80% is right 8 times in 10; larger dots hold more pairs."
        )
        x, y = "predicted chance (share)", "observed (share of pairs)"
        yield dots("Reliability", series, x=x, y=y, third="pairs", sized=True), reading


def _margins(stage: Stage) -> Iterator[tuple[Drawing, str]]:
    entries = [
        (_upper_end(entry), accuracy, f"n={entry.get('count', '?')}")
        for entry in stage.summary.get("margin_buckets") or []
        if (accuracy := number(entry.get("accuracy"))) is not None
    ]
    if entries:
        labels, accuracies, notes = zip(*entries, strict=True)
        drawing = bars(
            "Accuracy by margin",
            labels,
            [("accuracy", accuracies)],
            x="size of the margin (difference of the two scores)",
            y="pairs ranked right (share)",
            levels=[(0.5, "a coin")],
            notes=notes,
        )
        yield drawing, "Climbs to the right: where the model is surer it is right more often. n is the number of pairs."


def _upper_end(bucket: Mapping[str, Any]) -> str:
    """The label of a bucket, to be short without its lower end, which is the upper end of the one before."""
    low, high = number(bucket.get("low")), number(bucket.get("high"))
    if high is not None and math.isfinite(high):
        return f"≤ {format_number(high, 2)}"
    return "all" if low is None else f"> {format_number(low, 2)}"
