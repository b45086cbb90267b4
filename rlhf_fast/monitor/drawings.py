"""The data of one chart, which page/report.js draws, and the chart in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlhf_fast.monitor.numbers import format_number, number, rounded

Point = tuple[float, float | None]
T = TypeVar("T")
MAX_POINTS = 400  # of a line: about the width of a chart in pixels
MAX_BARS = 40


@dataclass(frozen=True)
class Series:
    """A line, or dots: ``points`` of x and y, where None is a gap.

    Attributes:
        colour: number of the colour in the style sheet.
        dash: number of the pattern of dashes, or of the dots' shape: what tells series apart without colour.
        mark: letter of the run, drawn at the end of the line.
    """

    label: str
    points: Sequence[Sequence[float | None]]
    colour: int = 0
    dash: int = 0
    mark: str = ""


@dataclass(frozen=True)
class Drawing:
    """One chart.

    Attributes:
        id: its place in the page.
        description: what it shows, in words and numbers.
        legend: (label, colour, dash) of each series; of one on its own, none.
        data: what page/report.js draws.
    """

    title: str
    description: str
    legend: Sequence[tuple[str, int, int]]
    data: dict[str, Any] = field(repr=False)
    id: str = ""


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    height: int = 220,
    levels: Sequence[tuple[float, str]] = (),
    band: Sequence[Sequence[float | None]] = (),
    ranges: Sequence[tuple[int, int, str]] = (),
    steps: bool = False,
) -> Drawing:
    """Lines over ``x``.

    Args:
        levels: (value, label) of dashed horizontal lines.
        band: (x, low, high): the interval around the first line.
        ranges: (first, last, label): shaded parts of the x axis.
        steps: the lines are the outlines of a histogram.
    """
    words = [_line_in_words(line) for line in series] if not steps else [_outline_in_words(line, x) for line in series]
    words += [label for _, label in levels]
    words += [f"marked: {label}, steps {first} to {last}" for first, last, label in ranges]
    data = {
        "kind": "lines",
        "x": x,
        "y": y,
        "height": height,
        "series": [_series(line) for line in series],
        "levels": [{"value": rounded(value), "label": label} for value, label in levels],
        "band": [[rounded(value) for value in row] for row in band],
        "ranges": [{"first": first, "last": last, "label": label} for first, last, label in ranges],
        "steps": steps,
    }
    return Drawing(title, _sentences(title, words), _legend(series), data)


def dots(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    third: str,
    joined: bool = False,
    frontiers: Sequence[Series] = (),
    sized: bool = False,
) -> Drawing:
    """Dots at (x, y); the third number of a point is what ``third`` says: a step, and later dots are stronger.

    Args:
        joined: a line goes from dot to dot.
        frontiers: staircases through the best points.
        sized: the third number is a count, and the dots are the larger the more it counts; the diagonal is drawn.
    """
    words = []
    for one in series:
        first, last = one.points[0], one.points[-1]
        said = f"{one.label}: {len(one.points)} dots"
        for point in (first, last):
            at = ", ".join(format_number(value) for value in point[:2] if value is not None)
            said += f"; {third} {point[2]:g} at ({at})"
        words.append(said)
    data = {
        "kind": "dots",
        "x": x,
        "y": y,
        "height": 260,
        "third": third,
        "series": [_series(one) for one in series],
        "joined": joined,
        "frontiers": [_series(one) for one in frontiers],
        "sized": sized,
    }
    return Drawing(title, _sentences(f"{title}: {y} over {x}", words), _legend(series), data)


def bars(
    title: str,
    categories: Sequence[str],
    parts: Sequence[tuple[str, Sequence[float]]],
    *,
    x: str,
    y: str,
    levels: Sequence[tuple[float, str]] = (),
    notes: Sequence[str] = (),
) -> Drawing:
    """A bar for each category, of ``parts`` stacked from the bottom. ``notes``: a text above each bar."""
    words = [
        f"{label}: "
        + ", ".join(f"{name} {format_number(value)}" for name, value in zip(categories, values, strict=True))
        for label, values in parts
    ]
    if len(categories) > 8:
        words = [f"{label}: {format_number(sum(values) / len(values))} on average" for label, values in parts]
    data = {
        "kind": "bars",
        "x": x,
        "y": y,
        "height": 220,
        "categories": list(categories),
        "parts": [{"label": label, "values": [rounded(value) for value in values]} for label, values in parts],
        "levels": [{"value": value, "label": label} for value, label in levels],
        "notes": list(notes),
    }
    legend = [(label, number, 0) for number, (label, _) in enumerate(parts)] if len(parts) > 1 else []
    return Drawing(title, _sentences(title, words), legend, data)


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most ``most`` points, each the mean of a group of neighbours; a group of gaps stays a gap."""
    each = math.ceil(len(points) / most)
    found: list[Point] = []
    for start in range(0, len(points), each or 1):
        group = points[start : start + each]
        values = [value for _, value in group if value is not None]
        found.append((group[-1][0], sum(values) / len(values) if values else None))
    return found


def spread(items: Sequence[T], most: int = MAX_POINTS) -> list[T]:
    """At most ``most`` of the items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def histogram(values: Sequence[Sequence[float]], *, whole: bool, bins: int = 16) -> list[list[Point]]:
    """For each group of values the outline of its histogram, in shares of the group; all have the same bins.

    ``whole``: the values are whole numbers, and so are the edges of the bins.
    """
    low, high = min(min(group) for group in values), max(max(group) for group in values)
    width = (high - low) / bins or 1.0
    if whole:
        width = float(max(1, math.ceil((high - low + 1) / bins)))
    count = max(1, math.floor((high - low) / width + 1e-9) + whole)
    edges = [low + i * width for i in range(count + 1)]
    outlines: list[list[Point]] = []
    for group in values:
        counts = [0] * count
        for value in group:
            counts[min(count - 1, int((value - low) / width))] += 1
        tops = [n / len(group) for n in counts]
        outlines.append([(edges[0], 0.0), *zip(edges, tops, strict=False), (edges[-1], tops[-1]), (edges[-1], 0.0)])
    return outlines


def _series(line: Series) -> dict[str, Any]:
    points = [[rounded(number(value)) for value in point] for point in line.points]
    return {"label": line.label, "colour": line.colour, "dash": line.dash, "mark": line.mark, "points": points}


def _legend(series: Sequence[Series]) -> list[tuple[str, int, int]]:
    return [(line.label, line.colour, line.dash) for line in series] if len(series) > 1 else []


def _sentences(title: str, words: Sequence[str]) -> str:
    return ". ".join([title, *words]) + "."


def _line_in_words(line: Series) -> str:
    values = [value for point in line.points if (value := number(point[1])) is not None]
    if not values:
        return f"{line.label}: no values"
    if len(values) == 1:
        return f"{line.label}: one point, {format_number(values[0])}"
    return (
        f"{line.label}: {len(values)} points, first {format_number(values[0])}, last {format_number(values[-1])}, "
        f"lowest {format_number(min(values))}, highest {format_number(max(values))}"
    )


def _outline_in_words(line: Series, x: str) -> str:
    tops = [(y, at) for at, y in line.points if y is not None and at is not None]
    share, at = max(tops, key=lambda top: top[0])
    low, high = tops[0][1], tops[-1][1]
    return (
        f"{line.label}: {x} from {format_number(low)} to {format_number(high)}, most often from {format_number(at)} "
        f"({share:.0%} of the responses)"
    )
