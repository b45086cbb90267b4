import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.monitor.axes import Axis, format_number, round_step, short_number
from rlhf_fast.monitor.charts import HEIGHT, WIDTH, Series, bar_chart, line_chart, reliability_chart, stacked_bars

SVG = "{http://www.w3.org/2000/svg}"
LABELS = {"title": "t", "x_label": "step", "y_label": "loss (nats)"}


def tags(svg: str, tag: str, **attributes: str) -> list[ET.Element]:
    found = ET.fromstring(svg).iter(f"{SVG}{tag}")
    return [one for one in found if all(one.get(name) == value for name, value in attributes.items())]


def dots(svg: str) -> list[tuple[float, float]]:
    return [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in tags(svg, "circle")]


def bars(svg: str, css: str) -> list[tuple[float, float]]:
    """(top, height) of every bar; a legend's swatch has rounded corners, a bar has none."""
    rects = [rect for rect in tags(svg, "rect", **{"class": css}) if "rx" not in rect.attrib]
    return [(float(rect.attrib["y"]), float(rect.attrib["height"])) for rect in rects]


def places(svg: str) -> list[float]:
    """Every coordinate of every drawn line and dot, alternately x and y."""
    numbers = [text for line in tags(svg, "polyline") for text in line.attrib["points"].replace(",", " ").split()]
    return [float(text) for text in numbers] + [value for dot in dots(svg) for value in dot]


values = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.floats(-10, 10)
lines = st.lists(st.tuples(st.integers(0, 10**6).map(float), values), max_size=12)


@given(first=lines, second=lines, reference=st.none() | st.floats(-1e6, 1e6))
def test_any_values_give_a_well_formed_chart_inside_its_frame(first, second, reference) -> None:  # type: ignore[no-untyped-def]
    svg = line_chart(
        [Series("a", first), Series("b", second)], reference=None if reference is None else (reference, "r"), **LABELS
    )
    numbers = places(svg)
    assert all(-0.1 <= value <= WIDTH + 0.1 for value in numbers[0::2])
    assert all(-0.1 <= value <= HEIGHT + 0.1 for value in numbers[1::2])
    assert not any(word in svg for word in ("nan", "inf", "None", "NaN"))
    known = [value for _, value in [*first, *second] if value is not None and abs(value) < 1e100]
    assert len(dots(svg)) == len(known)  # each drawable value is shown, and nothing else


def test_points_land_where_their_values_say() -> None:
    svg = line_chart([Series("a", [(0, 0.0), (5, 10.0), (10, 5.0)])], **LABELS)
    (x0, y0), (x1, y1), (x2, y2) = dots(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x2 > x0
    assert y1 < y2 < y0  # larger values are higher on the page, which is a smaller y
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.11)
    labels = {
        label.text: float(label.attrib["y"]) for label in tags(svg, "text", **{"class": "tick", "text-anchor": "end"})
    }
    assert labels["0"] - 3.5 == pytest.approx(y0, abs=0.11)  # the zero's grid line runs through the zero's dot


def test_a_single_point_is_a_dot_without_a_line() -> None:
    svg = line_chart([Series("a", [(3, 1.5)])], **LABELS)
    assert len(dots(svg)) == 1 and not tags(svg, "polyline")
    assert [text.text for text in tags(svg, "text", **{"class": "value t0"})] == ["1.5"]


def test_a_gap_cuts_the_line_and_an_island_is_a_dot() -> None:
    many = [(float(x), 1.0 * x) for x in range(100)]
    many[50] = (50.0, None)
    many[52] = (52.0, math.nan)
    svg = line_chart([Series("a", many)], **LABELS)
    assert [len(line.attrib["points"].split()) for line in tags(svg, "polyline")] == [50, 47]
    assert len(dots(svg)) == 1  # step 51, alone between two gaps


def test_reference_and_band_widen_the_axis_and_are_drawn() -> None:
    svg = line_chart(
        [Series("a", [(0, 1.0), (1, 1.1)])],
        reference=(5.0, "target 5"),
        band=[(0, -3.0, 2.0), (1, -2.0, None)],
        **LABELS,
    )
    (line,) = tags(svg, "line", **{"class": "ref"})
    assert 0 < float(line.attrib["y1"]) < min(y for _, y in dots(svg))
    assert "target 5 at 5" in ET.fromstring(svg).findtext(f"{SVG}desc", "")
    (interval,) = tags(svg, "line", **{"class": "line s0 thin"})  # one whole interval: a bar, not an area
    assert float(interval.attrib["y1"]) > max(y for _, y in dots(svg)) > float(interval.attrib["y2"])
    svg = line_chart([Series("a", [(0, 1.0), (1, 1.1)])], band=[(0, 0.5, 1.5), (1, 0.6, 1.6)], **LABELS)
    (area,) = tags(svg, "polygon")
    assert len(area.attrib["points"].split()) == 4


def test_words_for_those_who_cannot_see_it() -> None:
    svg = line_chart([Series("loss <a>", [(0, 3.0), (1, None), (2, 1.0), (3, 2.0)])], **{**LABELS, "title": "A & B"})
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert [child.tag for child in root][:2] == [f"{SVG}title", f"{SVG}desc"]
    assert root.findtext(f"{SVG}title") == "A & B"
    assert root.findtext(f"{SVG}desc") == "loss <a>: 3 points, first 3, last 2, lowest 1, highest 3."
    assert {"step", "loss (nats)"} <= {text.text for text in tags(svg, "text", **{"class": "label"})}


def test_two_lines_have_a_legend_and_last_values_that_do_not_overlap() -> None:
    svg = line_chart([Series("training", [(0, 3.0), (1, 1.0)]), Series("validation", [(0, 3.0), (1, 1.01)])], **LABELS)
    assert {"training", "validation"} <= {text.text for text in tags(svg, "text", **{"class": "label"})}
    heights = [float(tags(svg, "text", **{"class": f"value t{index}"})[0].attrib["y"]) for index in (0, 1)]
    assert abs(heights[0] - heights[1]) >= 11.9


def test_bars_stand_on_zero_in_proportion() -> None:
    svg = bar_chart([("low", 0.25, "n=1"), ("none", None, "n=0"), ("high", 1.0, "n=<9>")], y_range=(0.0, 1.0), **LABELS)
    (top_low, low), (top_high, high) = bars(svg, "f0")
    assert high / low == pytest.approx(4.0, rel=0.01)
    assert top_low + low == pytest.approx(top_high + high, abs=0.11)
    assert {"n=1", "n=<9>"} == {text.text for text in tags(svg, "text", **{"class": "note"})}


def test_stacked_bars_stand_on_one_another() -> None:
    svg = stacked_bars([10, 20], [("rollout", [3.0, 6.0]), ("score", [2.0, 4.0]), ("update", [1.0, 2.0])], **LABELS)
    rollout, score, update = bars(svg, "f0"), bars(svg, "f1"), bars(svg, "f2")
    for (low_top, low), (middle_top, middle), (high_top, high) in zip(rollout, score, update, strict=True):
        assert middle_top + middle == pytest.approx(low_top, abs=0.11)
        assert high_top + high == pytest.approx(middle_top, abs=0.11)
        assert (low / high, middle / high) == (pytest.approx(3.0, rel=0.02), pytest.approx(2.0, rel=0.02))
    assert rollout[1][1] / rollout[0][1] == pytest.approx(2.0, rel=0.01)
    assert {"rollout", "score", "update", "step"} <= {text.text for text in tags(svg, "text", **{"class": "label"})}


def test_labels_of_many_bars_do_not_collide() -> None:
    svg = stacked_bars(range(1000, 1040), [("a", [1.0] * 40)], **LABELS)
    ticks = [tick for tick in tags(svg, "text", **{"class": "tick"}) if "," in (tick.text or "")]
    assert [tick.text for tick in ticks][:2] != ["1,000", "1,001"]
    xs = [float(tick.attrib["x"]) for tick in ticks]
    assert len(xs) > 3 and all(right - left >= 30 for left, right in zip(xs, xs[1:], strict=False))
    assert len(bars(svg, "f0")) == 40


def test_a_calibrated_dot_lies_on_the_diagonal_and_a_confident_one_below() -> None:
    svg = reliability_chart([(0.6, 0.6, 100), (0.9, 0.7, 25)], title="t", x_label="x", y_label="y")
    (diagonal,) = tags(svg, "line", **{"class": "ref"})
    x1, y1, x2, y2 = (float(diagonal.attrib[name]) for name in ("x1", "y1", "x2", "y2"))
    on, below = ((y1 + (x - x1) / (x2 - x1) * (y2 - y1), y) for x, y in dots(svg))
    assert on[1] == pytest.approx(on[0], abs=0.2)
    assert below[1] > below[0] + 10
    sizes = [float(dot.attrib["r"]) - 2.5 for dot in tags(svg, "circle")]
    assert sizes[0] / sizes[1] == pytest.approx(2.0, rel=0.05)  # four times the pairs, four times the area


@pytest.mark.parametrize(
    ("span", "count", "step"), [(1.0, 4, 0.25), (100, 4, 25), (7, 4, 2), (3e-5, 3, 1e-5), (9, 1, 10)]
)
def test_ticks_are_round(span: float, count: int, step: float) -> None:
    assert round_step(span, count) == pytest.approx(step)


@given(st.lists(st.floats(-1e90, 1e90), min_size=1, max_size=5))
def test_an_axis_holds_its_values_and_few_ticks(values: list[float]) -> None:
    axis = Axis.fit(values, 0.0, 100.0)
    assert all(-1e-6 <= axis.at(value) <= 100 + 1e-6 for value in values)
    assert len(axis.ticks) <= 6
    assert all(axis.low - 1e-6 * abs(axis.low) <= value for value, _ in axis.ticks)
    assert len({label for _, label in axis.ticks}) == len(axis.ticks) or axis.high - axis.low < 0.01 * max(
        map(abs, values)
    )


def test_an_axis_of_positive_values_does_not_reach_below_zero() -> None:
    assert Axis.fit([0.0, 10.0], 0, 1).low == 0.0
    assert Axis.fit([0.1, 10.0], 0, 1).low == 0.0
    assert Axis.fit([-10.0, -0.1], 0, 1).high == 0.0
    assert Axis.fit([0.0, 0.0], 0, 1).low == 0.0


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 4], ["0", "1", "2", "3", "4"]),
        ([0, 1.0], ["0", "0.25", "0.50", "0.75", "1.00"]),
        ([0, 20000], ["0", "5k", "10k", "15k", "20k"]),
        ([0, 2e6], ["0", "0.5M", "1M", "1.5M", "2M"]),
        ([0, 2e-6], ["0", "5e-07", "1.0e-06", "1.5e-06", "2.0e-06"]),
    ],
)
def test_tick_labels(values: list[float], labels: list[str]) -> None:
    assert [label for _, label in Axis.fit(values, 0, 1, pad=0.0).ticks] == labels


@pytest.mark.parametrize(
    ("value", "long", "short"),
    [
        (0, "0", "0"),
        (0.77694, "0.7769", "0.777"),
        (12.0, "12", "12"),
        (-3.14159, "-3.142", "-3.14"),
        (12345.6, "12,346", "12.3k"),
        (2_500_000, "2,500,000", "2.5M"),
        (0.00012345, "0.0001234", "1.2e-04"),
        (1.5e-7, "1.50e-07", "1.5e-07"),
        (3e12, "3.00e+12", "3.0e+12"),
    ],
)
def test_numbers(value: float, long: str, short: str) -> None:
    assert (format_number(value), short_number(value)) == (long, short)
