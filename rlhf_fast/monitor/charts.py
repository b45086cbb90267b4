"""Charts as inline SVG text, without scripts, fonts or requests; colours come from the page's CSS variables.

Every chart is an ``<svg role="img">`` with a title, a description in words, axis labels with units, and a legend if it
shows several series. A value of None is a gap in its line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rlhf_fast.monitor.axes import Axis, Point, format_number, number, segments, short_number

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 54, 26, 38  # right: room for the last value beside its line
MAX_DOTS = 40  # lines with more points have no dots


@dataclass(frozen=True)
class Series:
    """One named line; ``points`` are (x, y), with y None for a missing value."""

    name: str
    points: Sequence[Point]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    reference: tuple[float, str] | None = None,
    band: Sequence[tuple[float, float | None, float | None]] | None = None,
    height: int = HEIGHT,
) -> str:
    """Lines over a shared x axis.

    Args:
        reference: (y, label) of a dashed level line.
        band: (x, low, high) of an interval, drawn behind the first series.
    """
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    lows_highs = [value for _, low, high in band or () for value in (low, high)]
    plot = _Plot(
        Axis.fit(xs, LEFT, WIDTH - RIGHT, ticks=5, pad=0.0, least_step=1.0),
        Axis.fit(
            [*ys, *lows_highs, reference[0] if reference else None], height - BOTTOM, TOP, ticks=max(2, height // 55)
        ),
        height,
    )
    shapes = [_band(plot, band)] if band else []
    if reference:
        shapes.append(_reference(plot, *reference))
    shapes += [_line(plot, index, line) for index, line in enumerate(series)]
    shapes.append(_last_values(plot, series))
    if len(series) > 1:
        shapes.append(_legend([line.name for line in series]))
    words = [_in_words(line) for line in series]
    if reference:
        words.append(f"{reference[1]} at {format_number(reference[0])}")
    return plot.svg(shapes, title, x_label, y_label, ". ".join(words))


def bar_chart(
    bars: Sequence[tuple[str, float | None, str]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    reference: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """One bar for each (label, value, note); the note is printed above its bar."""
    values = [value for _, value, _ in bars]
    y_axis = Axis.fit([0.0, *values, reference[0] if reference else None, *(y_range or ())], HEIGHT - BOTTOM, TOP)
    plot = _Plot(Axis.categories([label for label, _, _ in bars], LEFT, WIDTH - RIGHT), y_axis, HEIGHT)
    shapes, zero, width = [], y_axis.at(0.0), 0.62 * plot.x.slot
    for index, (label, value, note) in enumerate(bars):
        if value is None:
            continue
        x, y = plot.x.at(index), y_axis.at(value)
        tip = f"<title>{escape(f'{label}: {format_number(value)} ({note})')}</title>"
        shapes.append(
            f'<rect class="f0" x="{x - width / 2:.1f}" y="{min(y, zero):.1f}" width="{width:.1f}" '
            f'height="{abs(zero - y):.1f}">{tip}</rect>'
            f'<text class="note" x="{x:.1f}" y="{min(y, zero) - 4:.1f}" text-anchor="middle">{escape(note)}</text>'
        )
    if reference:
        shapes.append(_reference(plot, *reference, beside=True))
    words = [f"{label}: {format_number(value)} ({note})" for label, value, note in bars if value is not None]
    return plot.svg(shapes, title, x_label, y_label, ". ".join(words))


def reliability_chart(points: Sequence[tuple[float, float, int]], *, title: str, x_label: str, y_label: str) -> str:
    """A dot for each (predicted share, observed share, count), with an area that grows with the count, and the
    diagonal."""
    lowest = min(min(predicted, observed) for predicted, observed, _ in points)
    floor = min(int(lowest * 10), 9) / 10
    plot = _Plot(
        Axis.fit([floor, 1.0], LEFT, WIDTH - RIGHT, ticks=5, pad=0.0),
        Axis.fit([floor, 1.0], HEIGHT - BOTTOM, TOP, ticks=5, pad=0.0),
        HEIGHT,
    )
    most = max(count for _, _, count in points) or 1
    start, end = (plot.x.at(floor), plot.y.at(floor)), (plot.x.at(1.0), plot.y.at(1.0))
    shapes = [
        f'<line class="ref" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
        f'<text class="reflabel" x="{end[0] - 26:.1f}" y="{end[1] + 12:.1f}" text-anchor="end">calibrated</text>'
    ]
    path = " ".join(f"{plot.x.at(predicted):.1f},{plot.y.at(observed):.1f}" for predicted, observed, _ in points)
    shapes.append(f'<polyline class="line s0 thin" points="{path}"/>')
    words = []
    for predicted, observed, count in points:
        text = f"predicted {format_number(predicted)}, observed {format_number(observed)}, {count} pairs"
        words.append(text)
        shapes.append(
            f'<circle class="f0 edge" cx="{plot.x.at(predicted):.1f}" cy="{plot.y.at(observed):.1f}" '
            f'r="{2.5 + 5.5 * (count / most) ** 0.5:.1f}"><title>{escape(text)}</title></circle>'
        )
    return plot.svg(shapes, title, x_label, y_label, ". ".join(words))


def stacked_bars(
    xs: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]], *, title: str, x_label: str, y_label: str
) -> str:
    """One bar at each x, with its layers (name, value at each x; none negative) stacked."""
    totals = [sum(values) for values in zip(*(values for _, values in layers), strict=True)]
    y_axis = Axis.fit([0.0, *totals], HEIGHT - BOTTOM, TOP, ticks=4)
    plot = _Plot(Axis.categories([format_number(x) for x in xs], LEFT, WIDTH - 12), y_axis, HEIGHT)
    shapes, width = [], min(0.8 * plot.x.slot, 40.0)
    for index in range(len(xs)):
        base = 0.0
        for layer, (_, values) in enumerate(layers):
            top = y_axis.at(base + values[index])
            shapes.append(
                f'<rect class="f{layer}" x="{plot.x.at(index) - width / 2:.1f}" y="{top:.1f}" '
                f'width="{width:.1f}" height="{y_axis.at(base) - top:.1f}"/>'
            )
            base += values[index]
    shapes.append(_legend([name for name, _ in layers]))
    words = [f"{name}: {format_number(sum(values) / len(values))} on average" for name, values in layers]
    return plot.svg(shapes, title, x_label, y_label, ". ".join(words))


@dataclass(frozen=True)
class _Plot:
    """The frame of a chart: grid lines, tick labels, axis labels. Shapes are drawn over it."""

    x: Axis
    y: Axis
    height: int

    def svg(self, shapes: Sequence[str], title: str, x_label: str, y_label: str, words: str) -> str:
        bottom, middle = self.y.start, (self.y.start + self.y.end) / 2
        grid = []
        for value, label in self.y.ticks:
            y = self.y.at(value)
            grid.append(
                f'<line class="gridline" x1="{self.x.start:.1f}" x2="{self.x.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{self.x.start - 6:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'
            )
        for value, label in self.x.ticks:
            grid.append(
                f'<text class="tick" x="{self.x.at(value):.1f}" y="{bottom + 15:.1f}" '
                f'text-anchor="middle">{escape(label)}</text>'
            )
        grid.append(
            f'<text class="label" x="{(self.x.start + self.x.end) / 2:.1f}" y="{self.height - 6}" '
            f'text-anchor="middle">{escape(x_label)}</text>'
            f'<text class="label" transform="translate(11 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )
        return (
            f'<svg role="img" viewBox="0 0 {WIDTH} {self.height}" xmlns="http://www.w3.org/2000/svg">'
            f"<title>{escape(title)}</title><desc>{escape(words)}.</desc>{''.join(grid)}{''.join(shapes)}</svg>"
        )


def _line(plot: _Plot, index: int, line: Series) -> str:
    runs = segments(line.points)
    dotted = sum(len(run) for run in runs) <= MAX_DOTS
    shapes = []
    for run in runs:
        places = [(plot.x.at(x), plot.y.at(y)) for x, y in run]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        if len(run) > 1:
            shapes.append(f'<polyline class="line s{index}" points="{path}"/>')
        if dotted or len(run) == 1:  # a single point has no line
            for (x, y), (step, value) in zip(places, run, strict=True):
                tip = f"{line.name} at {format_number(step)}: {format_number(value)}"
                shapes.append(
                    f'<circle class="f{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"><title>{escape(tip)}</title></circle>'
                )
    return "".join(shapes)


def _last_values(plot: _Plot, series: Sequence[Series]) -> str:
    """The last value of each line, printed at its end; labels are moved apart if they would overlap."""
    ends = []
    for index, line in enumerate(series):
        runs = segments(line.points)
        if runs:
            x, y = runs[-1][-1]
            ends.append((plot.y.at(y), plot.x.at(x), index, short_number(y)))
    shapes, previous = [], float("-inf")
    for y, x, index, text in sorted(ends):
        previous = max(y, previous + 12)
        shapes.append(f'<text class="value t{index}" x="{x + 6:.1f}" y="{previous + 3.5:.1f}">{text}</text>')
    return "".join(shapes)


def _band(plot: _Plot, band: Sequence[tuple[float, float | None, float | None]]) -> str:
    whole = [(x, low, high) for x, low, high in band if low is not None and high is not None]
    if len(whole) == 1:  # an area needs two points: a single interval is drawn as an error bar
        x, low, high = whole[0]
        at, bottom, top = plot.x.at(x), plot.y.at(low), plot.y.at(high)
        return f'<line class="line s0 thin" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}" y2="{top:.1f}"/>'
    path = [(x, high) for x, _, high in whole] + [(x, low) for x, low, _ in reversed(whole)]
    points = " ".join(f"{plot.x.at(x):.1f},{plot.y.at(y):.1f}" for x, y in path)
    return f'<polygon class="f0 band" points="{points}"/>' if path else ""


def _reference(plot: _Plot, value: float, label: str, *, beside: bool = False) -> str:
    """A dashed horizontal line with its label above it, or with ``beside`` to its right, where bars do not hide it."""
    y = plot.y.at(value)
    x, text_y = plot.x.start + 4, y + (12 if y < TOP + 12 else -4)
    if beside:
        x, text_y = plot.x.end + 4, y + 3.5
    return (
        f'<line class="ref" x1="{plot.x.start:.1f}" x2="{plot.x.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="reflabel" x="{x:.1f}" y="{text_y:.1f}">{escape(label)}</text>'
    )


def _legend(names: Sequence[str]) -> str:
    shapes, x = [], float(LEFT)
    for index, name in enumerate(names):
        shapes.append(
            f'<rect class="f{index}" x="{x:.1f}" y="6" width="10" height="10" rx="2"/>'
            f'<text class="label" x="{x + 14:.1f}" y="15">{escape(name)}</text>'
        )
        x += 14 + 6.2 * len(name) + 14  # 6.2: slightly more than the mean width of a character at 11 px
    return "".join(shapes)


def _in_words(line: Series) -> str:
    values = [value for _, y in line.points if (value := number(y)) is not None]
    if not values:
        return f"{line.name}: no values"
    if len(values) == 1:
        return f"{line.name}: one point, {format_number(values[0])}"
    return (
        f"{line.name}: {len(values)} points, first {format_number(values[0])}, last {format_number(values[-1])}, "
        f"lowest {format_number(min(values))}, highest {format_number(max(values))}"
    )
