"""The charts of each stage, of one run or of several: those that ``rlhf_fast.metrics`` declares, and those of
``rlhf_fast.monitor.relations``. Charts without data are left out."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from rlhf_fast.metrics import FIXED_OF_PPO, Chart, Metric, charts
from rlhf_fast.monitor.drawings import MAX_BARS, MAX_POINTS, Drawing, Point, Series, bars, lines, thinned
from rlhf_fast.monitor.numbers import format_number, number
from rlhf_fast.monitor.relations import relations
from rlhf_fast.monitor.runs import Row, Stage

MAX_POINTS_OF_ALL = 1200  # of a metric in a comparison, all runs together


@dataclass(frozen=True)
class Panel:
    """One card of the report: its charts (one below the other) and an explanation.

    Attributes:
        metrics: the names of the metrics that it draws over the steps.
    """

    title: str
    explanation: str
    drawings: Sequence[Drawing]
    metrics: frozenset[str] = frozenset()


def stage_panels(stages: Sequence[Stage]) -> list[Panel]:
    """The panels that have data, of the same stage in one run or in several; of several, each has its ``mark``."""
    name = stages[0].name
    panels: dict[Chart, Panel] = {}
    for family, members in charts(name).items():
        for chart, metrics in _members(family, members, stages):
            panel = (_bars if chart.bars else _lines)(chart, metrics, stages)
            if panel is None:
                continue
            above = panels.get(chart.below) if chart.below else None
            if above is not None and chart.below is not None:
                explanation = f"{above.explanation} {panel.explanation}"
                drawn = [*above.drawings, *panel.drawings]
                panels[chart.below] = Panel(above.title, explanation, drawn, above.metrics | panel.metrics)
            elif chart.below is None:
                panels[chart] = panel
    others = [Panel(drawing.title, reading, [drawing]) for drawing, reading in relations(stages)]
    return _with_ids(name, [*panels.values(), *others])


def metric_links(panels: Sequence[Panel]) -> dict[str, tuple[str, str]]:
    """Metric name -> id and title of the first chart that draws it."""
    found: dict[str, tuple[str, str]] = {}
    for panel in panels:
        for name in panel.metrics:
            found.setdefault(name, (panel.drawings[0].id, panel.title))
    return found


def _with_ids(stage: str, panels: Sequence[Panel]) -> list[Panel]:
    """The panels with an id for each chart, made from its title: names of functions may hold any character."""
    taken: set[str] = set()

    def named(drawing: Drawing) -> Drawing:
        start = f"{stage}-{re.sub('[^a-z0-9]+', '-', drawing.title.lower()).strip('-')}"
        id = next(id for number in count(1) if (id := f"{start}-{number}" if number > 1 else start) not in taken)
        taken.add(id)
        return replace(drawing, id=id)

    return [replace(panel, drawings=[named(drawing) for drawing in panel.drawings]) for panel in panels]


def _members(chart: Chart, metrics: Sequence[Metric], stages: Sequence[Stage]) -> Iterator[tuple[Chart, list[Metric]]]:
    """The chart with its metrics; for a family of metrics, one chart per function for which the first was logged."""
    first = metrics[0]
    if not first.is_family:
        yield chart, list(metrics)
        return
    logged = {key for stage in stages for row in stage.metrics for key in row} - FIXED_OF_PPO
    for name in sorted({name for key in logged if (name := first.named_by(key)) is not None}):
        yield replace(chart, title=chart.title.format(name=name)), [metric.of(name) for metric in metrics]


def _lines(chart: Chart, metrics: Sequence[Metric], stages: Sequence[Stage]) -> Panel | None:
    """A line for each metric of each run that has a value, and the level and the interval if there are any."""
    alone = not stages[0].mark
    drawn = {kind: [metric for metric in metrics if metric.drawn == kind] for kind in ("line", "low", "high", "level")}
    several = len(drawn["line"]) > 1
    most = min(MAX_POINTS, MAX_POINTS_OF_ALL // len(stages))
    series, each = [], 1
    for stage in stages:
        for place, metric in enumerate(drawn["line"]):
            points = _points(stage.metrics, metric.name)
            if all(y is None for _, y in points):
                continue
            each = max(each, math.ceil(len(points) / most))
            label = metric.label if alone else f"{stage.mark} {metric.label}" if several else stage.mark
            dash = place if alone or several else stage.place
            series.append(Series(label, thinned(points, most), place if alone else stage.place, dash, stage.mark))
    if not series:
        return None
    levels = _levels(drawn["level"], stages)
    ends = zip(drawn["low"], drawn["high"], strict=True)
    names = frozenset(metric.name for metric in metrics)
    drawing = lines(
        chart.title,
        series,
        x="step" if each == 1 else f"step (each point the mean of {each} or fewer)",
        y=chart.y_label,
        height=chart.height,
        levels=levels,
        band=[row for low, high in ends for row in _band(stages[0].metrics, low, high)] if alone else (),
        ranges=_ranges(stages[0], names) if alone else (),
    )
    reading = chart.reading_with_level if levels else chart.reading
    return Panel(chart.card or chart.title, reading, [drawing], names)


def _levels(metrics: Sequence[Metric], stages: Sequence[Stage]) -> list[tuple[float, str]]:
    """(value, label) of the level lines; one that not all runs share has their marks."""
    marks: dict[tuple[str, float], list[str]] = {}
    for stage in stages:
        for metric in metrics:
            value = _constant(metric.name, stage)
            if value is not None:
                marks.setdefault((metric.label, value), []).append(stage.mark)
    levels = []
    for (label, value), own in marks.items():
        text = f"{label} {format_number(value)}"
        levels.append((value, text if len(own) == len(stages) else f"{', '.join(own)} {text}"))
    return levels


def _bars(chart: Chart, metrics: Sequence[Metric], stages: Sequence[Stage]) -> Panel | None:
    """A stacked bar for each step, or for groups of consecutive steps; of several runs, one for each, the mean of its
    steps. Uses the metrics that have values, and the steps with a value of each of them."""
    rows = [row for stage in stages for row in stage.metrics]
    parts = [metric for metric in metrics if any(number(row.get(metric.name)) is not None for row in rows)]
    wholes = [
        [row for row in stage.metrics if parts and all(number(row.get(part.name)) is not None for part in parts)]
        for stage in stages
    ]
    marked = [(stage.mark, whole) for stage, whole in zip(stages, wholes, strict=True) if whole]
    if not marked:
        return None
    x = "run"
    if not stages[0].mark:
        (whole,) = wholes
        each = math.ceil(len(whole) / MAX_BARS)
        groups = [whole[start : start + each] for start in range(0, len(whole), each)]
        marked = [(f"{group[-1]['step']:,}", group) for group in groups]
        x = "step" if each == 1 else f"step (each bar the mean of {each} or fewer)"
    drawing = bars(
        chart.title,
        [mark for mark, _ in marked],
        [(part.label, [_mean(group, part.name) for _, group in marked]) for part in parts],
        x=x,
        y=chart.y_label,
    )
    names = frozenset(metric.name for metric in metrics)
    return Panel(chart.card or chart.title, chart.reading, [drawing], names)


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _ranges(stage: Stage, names: frozenset[str]) -> list[tuple[int, int, str]]:
    """The steps of the verdicts that joined one of the metrics."""
    return [
        (verdict.first_step, verdict.last_step, verdict.title)
        for verdict in stage.verdicts or ()
        if not names.isdisjoint(verdict.metrics)
    ]


def _points(rows: Sequence[Row], key: str) -> list[Point]:
    """(step, value) of the rows that have the metric; a null is a gap."""
    return [(row["step"], number(row[key])) for row in rows if key in row]


def _band(rows: Sequence[Row], low: Metric, high: Metric) -> list[tuple[float, float | None, float | None]]:
    whole = [row for row in rows if low.name in row and high.name in row]
    every = math.ceil(len(whole) / MAX_POINTS) or 1
    return [(row["step"], number(row[low.name]), number(row[high.name])) for row in whole[::-every][::-1]]


def _constant(name: str, stage: Stage) -> float | None:
    """A figure that is constant over a run: from the summary, else from the last line that has it."""
    figure: Any = stage.figures.get(name, stage.summary.get(name))
    value = number(figure.get("value") if isinstance(figure, Mapping) else figure)
    if value is not None:
        return value
    return next((value for row in reversed(stage.metrics) if (value := number(row.get(name))) is not None), None)
