"""Which charts each stage has, and what good looks like in each. A chart without data is left out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_fast.monitor.axes import Point, format_number, number
from rlhf_fast.monitor.charts import Series, bar_chart, line_chart, reliability_chart, stacked_bars

MAX_POINTS = 400  # a line wider than its pixels says no more
MAX_BARS = 40
TALL, SMALL = 172, 112  # two charts in one card, hardly taller than one

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """One card of the report: its charts (SVG texts, one under another) and one sentence on reading them."""

    title: str
    explanation: str
    charts: Sequence[str]


def stage_panels(stage: str, rows: Sequence[Row], summary: Row) -> list[Panel]:
    """The panels of ``sft``, ``reward`` or ``ppo`` for which there is data.

    Args:
        rows: the lines of metrics.jsonl, each with a ``step``.
        summary: summary.json, or an empty mapping while the stage runs.
    """
    makers: dict[str, Callable[[Sequence[Row], Row], list[Panel | None]]] = {
        "sft": _sft,
        "reward": _reward,
        "ppo": _ppo,
    }
    return [panel for panel in makers[stage](rows, summary) if panel is not None]


def _sft(rows: Sequence[Row], summary: Row) -> list[Panel | None]:
    return [
        _lines(
            rows,
            "Loss",
            "Both lines fall and flatten together; a validation loss that turns upwards is overfitting.",
            {"training": "loss", "validation": "eval_loss"},
            "loss (nats per token)",
        )
    ]


def _reward(rows: Sequence[Row], summary: Row) -> list[Panel | None]:
    ceiling = _constant("label_noise_ceiling", rows, summary)
    accuracy = _lines(
        rows,
        "Accuracy on held-out pairs",
        "Rises from 0.5 (a coin) towards 0.7 to 0.8 on human preferences; far above suggests a leak or a shortcut."
        if ceiling is None
        else "Rises from 0.5 (a coin) towards the noise ceiling, the best that labels this noisy allow; "
        "above it suggests a leak.",
        {"accuracy": "eval_accuracy"},
        "pairs ranked right (share)",
        reference=None if ceiling is None else (ceiling, f"noise ceiling {format_number(ceiling)}"),
        band=_band(rows, "eval_accuracy_low", "eval_accuracy_high"),
    )
    loss = _lines(
        rows,
        "Pairwise loss",
        "Falls from 0.69 (a coin) and flattens; a validation loss that turns upwards is overfitting.",
        {"training": "loss", "validation": "eval_loss"},
        "loss (nats per pair)",
    )
    return [accuracy, loss, _reliability(summary), _margins(summary)]


def _ppo(rows: Sequence[Row], summary: Row) -> list[Panel | None]:
    target = _constant("objective/kl_target", rows, summary)
    gold = sorted({name for row in rows for name in row if name.startswith("eval/")} - {"eval/scores"})
    panels = [
        _lines(
            rows,
            "Score",
            "Rises, then levels off; it is only a stand-in for what is wanted, so read it beside the gold scores.",
            {"score": "objective/scores"},
            "mean score",
        ),
        _lines(
            rows,
            "Score on held-out prompts",
            "Rises with the score on the training prompts; one that stays behind is overfitting to those prompts.",
            {"score": "eval/scores"},
            "mean score",
        ),
        *(
            _lines(
                rows,
                f"Gold score: {name.removeprefix('eval/')}",
                "Rises with the score that is trained on; one that falls while that score climbs is reward hacking.",
                {"held-out prompts": name, "training prompts": name.replace("eval/", "objective/", 1)},
                "mean score",
            )
            for name in gold
        ),
        _kl(rows, target),
    ]
    singles = [
        (
            "Entropy",
            "Falls slowly; a drop to near zero is a policy that has collapsed.",
            "objective/entropy",
            "nats per response",
        ),
        (
            "Response length",
            "Stays near where it began; a steady climb means that length is being rewarded.",
            "response/length_mean",
            "tokens per response",
        ),
        (
            "Diversity (distinct-2)",
            "Stays level; a fall means that responses repeat themselves or one another.",
            "response/distinct_2",
            "distinct token pairs (share)",
        ),
        (
            "Critic: explained variance",
            "Climbs above 0 after warm-up, towards 1; at 0 or below the critic helps no more than a constant.",
            "critic/explained_variance",
            "share of variance",
        ),
        (
            "Clipped policy updates",
            "Stays small, about 0.05 to 0.2; much more means that updates are too large for the clip range.",
            "policy/clipfrac_avg",
            "clipped tokens (share)",
        ),
    ]
    panels += [_lines(rows, title, good, {title.lower(): key}, unit) for title, good, key, unit in singles]
    return [*panels, _seconds(rows)]


def _kl(rows: Sequence[Row], target: float | None) -> Panel | None:
    kl = _lines(
        rows,
        "KL from the reference",
        "Grows, then stays near its target; a sudden multiple of it means that the policy is running away."
        if target is not None
        else "Grows slowly and levels off; a sudden jump means that the policy is running away.",
        {"KL": "objective/kl"},
        "KL (nats per response)",
        TALL,
        reference=None if target is None else (target, f"target {format_number(target)}"),
    )
    coefficient = _lines(
        rows, "KL coefficient", "The controller's answer.", {"coefficient": "objective/kl_coef"}, "coefficient", SMALL
    )
    if kl is None or coefficient is None:
        return kl
    return Panel(kl.title, f"{kl.explanation} Below: the penalty's coefficient.", [*kl.charts, *coefficient.charts])


def _lines(
    rows: Sequence[Row],
    title: str,
    good: str,
    keys: Mapping[str, str],
    y_label: str,
    height: int | None = None,
    *,
    reference: tuple[float, str] | None = None,
    band: Sequence[tuple[float, float | None, float | None]] = (),
) -> Panel | None:
    """A line for each of ``keys`` (legend -> metric) that has a value somewhere."""
    found = {name: _points(rows, key) for name, key in keys.items()}
    found = {name: points for name, points in found.items() if any(number(y) is not None for _, y in points)}
    if not found:
        return None
    each = max(math.ceil(len(points) / MAX_POINTS) for points in found.values())
    series = [Series(name, _thinned(points)) for name, points in found.items()]
    x_label = "step" if each == 1 else f"step (each point the mean of {each} or fewer)"
    size = {} if height is None else {"height": height}
    chart = line_chart(series, title=title, x_label=x_label, y_label=y_label, reference=reference, band=band, **size)
    return Panel(title, good, [chart])


def _reliability(summary: Row) -> Panel | None:
    points = [
        (predicted, observed, int(entry.get("count") or 0))
        for entry in summary.get("reliability") or []
        if (predicted := number(entry.get("predicted"))) is not None
        and (observed := number(entry.get("observed"))) is not None
    ]
    if not points:
        return None
    title = "Reliability"
    chart = reliability_chart(
        points, title=title, x_label="predicted chance (share)", y_label="observed (share of pairs)"
    )
    good = "Dots on the dashed diagonal mean that a stated 80% is right 8 times in 10; larger dots hold more pairs."
    return Panel(title, good, [chart])


def _margins(summary: Row) -> Panel | None:
    bars = [
        (_range(entry.get("low"), entry.get("high")), number(entry.get("accuracy")), f"n={entry.get('count', '?')}")
        for entry in summary.get("margin_buckets") or []
    ]
    if all(accuracy is None for _, accuracy, _ in bars):
        return None
    title = "Accuracy by margin"
    chart = bar_chart(
        bars,
        title=title,
        x_label="size of the margin (difference of the two scores)",
        y_label="pairs ranked right (share)",
        reference=(0.5, "a coin"),
        y_range=(0.0, 1.0),
    )
    good = "Climbs to the right: where the model is surer it is right more often. n is the number of pairs."
    return Panel(title, good, [chart])


def _seconds(rows: Sequence[Row]) -> Panel | None:
    keys = {"rollout": "perf/seconds_rollout", "score": "perf/seconds_score", "update": "perf/seconds_update"}
    keys = {name: key for name, key in keys.items() if any(number(row.get(key)) is not None for row in rows)}
    whole = [row for row in rows if keys and all(number(row.get(key)) is not None for key in keys.values())]
    if not whole:
        return None
    each = math.ceil(len(whole) / MAX_BARS)
    groups = [whole[start : start + each] for start in range(0, len(whole), each)]
    layers = [(name, [sum(row[key] for row in group) / len(group) for group in groups]) for name, key in keys.items()]
    chart = stacked_bars(
        [group[-1]["step"] for group in groups],
        layers,
        title="Seconds per step",
        x_label="step" if each == 1 else f"step (each bar the mean of {each} or fewer)",
        y_label="seconds per step",
    )
    good = "Level from step to step; the tallest part is the one worth making faster."
    return Panel("Where the time goes", good, [chart])


def _points(rows: Sequence[Row], key: str) -> list[Point]:
    """(step, value) where the metric was written: null is a gap, an absent metric is not."""
    return [(row["step"], number(row[key])) for row in rows if key in row]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points, each the mean of its neighbours; a group of gaps stays a gap."""
    each = math.ceil(len(points) / MAX_POINTS)
    thinned: list[Point] = []
    for start in range(0, len(points), each):
        group = points[start : start + each]
        values = [value for _, value in group if value is not None]
        thinned.append((group[-1][0], sum(values) / len(values) if values else None))
    return thinned


def _band(rows: Sequence[Row], low: str, high: str) -> list[tuple[float, float | None, float | None]]:
    return [(row["step"], number(row[low]), number(row[high])) for row in rows if low in row and high in row]


def _constant(name: str, rows: Sequence[Row], summary: Row) -> float | None:
    """A figure that does not change over a run: from the summary, else the last line that has it."""
    figure = (summary.get("figures") or {}).get(name, summary.get(name))
    value = number(figure.get("value") if isinstance(figure, Mapping) else figure)
    if value is not None:
        return value
    return next((value for row in reversed(rows) if (value := number(row.get(name))) is not None), None)


def _range(low: Any, high: Any) -> str:
    """A bucket by its upper end, short enough to stand under its bar; the bar to its left ends where it begins."""
    low, high = number(low), number(high)
    if high is not None:
        return f"≤ {format_number(high, 2)}"
    return "all" if low is None else f"> {format_number(low, 2)}"
