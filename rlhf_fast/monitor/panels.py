"""The charts of each stage: those that ``rlhf_fast.metrics`` declares, and two from the summary of held-out pairs.
Charts without data are left out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_fast.metrics import FIXED_OF_PPO, Chart, Metric, charts
from rlhf_fast.monitor.axes import Point, format_number, number
from rlhf_fast.monitor.charts import Series, bar_chart, line_chart, reliability_chart, stacked_bars

MAX_POINTS = 400  # about the width of a chart in pixels
MAX_BARS = 40

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """One card of the report: its charts (SVG texts, stacked vertically) and an explanation."""

    title: str
    explanation: str
    charts: Sequence[str]


def stage_panels(stage: str, rows: Sequence[Row], summary: Row) -> list[Panel]:
    """The panels of the stage ``sft``, ``reward``, ``dpo`` or ``ppo`` that have data.

    Args:
        rows: the lines of metrics.jsonl, each with a ``step``.
        summary: summary.json, or an empty mapping while the stage runs.
    """
    panels: dict[Chart, Panel] = {}
    for family, members in charts(stage).items():
        for chart, metrics in _members(family, members, rows):
            panel = _bars(chart, metrics, rows) if chart.bars else _lines(chart, metrics, rows, summary)
            if panel is None:
                continue
            if chart.below is None:
                panels[chart] = panel
            elif chart.below in panels:
                above = panels[chart.below]
                explanation = f"{above.explanation} {panel.explanation}"
                panels[chart.below] = Panel(above.title, explanation, [*above.charts, *panel.charts])
    last = [_reliability(summary), _margins(summary)]
    return [*panels.values(), *(panel for panel in last if panel is not None)]


def _members(chart: Chart, metrics: Sequence[Metric], rows: Sequence[Row]) -> Iterator[tuple[Chart, Sequence[Metric]]]:
    """The chart with its metrics; for a family of metrics, one chart per function for which the first was logged."""
    first = metrics[0]
    if not first.is_family:
        yield chart, metrics
        return
    logged = {key for row in rows for key in row} - FIXED_OF_PPO
    for name in sorted({name for key in logged if (name := first.named_by(key)) is not None}):
        yield replace(chart, title=chart.title.format(name=name)), [metric.of(name) for metric in metrics]


def _lines(chart: Chart, metrics: Sequence[Metric], rows: Sequence[Row], summary: Row) -> Panel | None:
    """A line for each metric that has a value, and the horizontal level and the interval if there are any."""
    drawn = {kind: [metric for metric in metrics if metric.drawn == kind] for kind in ("line", "low", "high", "level")}
    found = {metric.label: _points(rows, metric.name) for metric in drawn["line"]}
    found = {label: points for label, points in found.items() if any(number(y) is not None for _, y in points)}
    if not found:
        return None
    levels = [(value, level) for level in drawn["level"] if (value := _constant(level.name, rows, summary)) is not None]
    each = max(math.ceil(len(points) / MAX_POINTS) for points in found.values())
    svg = line_chart(
        [Series(label, _thinned(points)) for label, points in found.items()],
        title=chart.title,
        x_label="step" if each == 1 else f"step (each point the mean of {each} or fewer)",
        y_label=chart.y_label,
        reference=next(((value, f"{level.label} {format_number(value)}") for value, level in levels), None),
        band=[point for low, high in zip(drawn["low"], drawn["high"], strict=True) for point in _band(rows, low, high)],
        height=chart.height,
    )
    return Panel(chart.card or chart.title, chart.reading_with_level if levels else chart.reading, [svg])


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


def _bars(chart: Chart, metrics: Sequence[Metric], rows: Sequence[Row]) -> Panel | None:
    """A stacked bar for each step, or for groups of consecutive steps. Uses the metrics that have values, and the steps
    with a value of each of them."""
    parts = [metric for metric in metrics if any(number(row.get(metric.name)) is not None for row in rows)]
    whole = [row for row in rows if parts and all(number(row.get(part.name)) is not None for part in parts)]
    if not whole:
        return None
    each = math.ceil(len(whole) / MAX_BARS)
    groups = [whole[start : start + each] for start in range(0, len(whole), each)]
    svg = stacked_bars(
        [group[-1]["step"] for group in groups],
        [(part.label, [sum(row[part.name] for row in group) / len(group) for group in groups]) for part in parts],
        title=chart.title,
        x_label="step" if each == 1 else f"step (each bar the mean of {each} or fewer)",
        y_label=chart.y_label,
    )
    return Panel(chart.card or chart.title, chart.reading, [svg])


def _points(rows: Sequence[Row], key: str) -> list[Point]:
    """(step, value) of the rows that have the metric; a null is a gap."""
    return [(row["step"], number(row[key])) for row in rows if key in row]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points, each the mean of a group of neighbours; a group of gaps stays a gap."""
    each = math.ceil(len(points) / MAX_POINTS)
    thinned: list[Point] = []
    for start in range(0, len(points), each):
        group = points[start : start + each]
        values = [value for _, value in group if value is not None]
        thinned.append((group[-1][0], sum(values) / len(values) if values else None))
    return thinned


def _band(rows: Sequence[Row], low: Metric, high: Metric) -> list[tuple[float, float | None, float | None]]:
    whole = [row for row in rows if low.name in row and high.name in row]
    return [(row["step"], number(row[low.name]), number(row[high.name])) for row in whole]


def _constant(name: str, rows: Sequence[Row], summary: Row) -> float | None:
    """A figure that is constant over a run: from the summary, else from the last line that has it."""
    figure = (summary.get("figures") or {}).get(name, summary.get(name))
    value = number(figure.get("value") if isinstance(figure, Mapping) else figure)
    if value is not None:
        return value
    return next((value for row in reversed(rows) if (value := number(row.get(name))) is not None), None)


def _range(low: Any, high: Any) -> str:
    """The label of a bucket: only its upper end, to be short; the lower end is the upper end of the bar to the left."""
    low, high = number(low), number(high)
    if high is not None:
        return f"≤ {format_number(high, 2)}"
    return "all" if low is None else f"> {format_number(low, 2)}"
