import pytest

from rlhf_fast.monitor.drawings import histogram, spread, thinned
from rlhf_fast.monitor.numbers import format_number, format_value, number


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (0.01234567, "0.01235"),
        (-2.5, "-2.5"),
        (12345.0, "12,345"),
        (0.00001, "1.00e-05"),
        (3e12, "3.00e+12"),
        (999.96, "1,000"),
    ],
)
def test_numbers_as_texts(value: float, text: str) -> None:
    assert format_number(value) == text


def test_what_cannot_be_drawn_is_no_number() -> None:
    assert [number(value) for value in (None, "1", True, float("nan"), float("inf"), -1e101)] == [None] * 6
    assert [format_value(value) for value in (None, float("nan"), True, "x", 0.5)] == ["–", "–", "yes", "x", "0.5"]


def test_a_long_line_is_means_of_neighbours_and_gaps_stay() -> None:
    points = [(step, None if step >= 1000 else step % 2) for step in range(2000)]
    assert thinned(points, 400)[:200] == [(5 * i + 4, (2 if i % 2 == 0 else 3) / 5) for i in range(200)]
    assert {y for _, y in thinned(points, 400)[200:]} == {None}
    assert thinned([], 400) == []


def test_spread_keeps_both_ends() -> None:
    assert spread(range(1000), 4) == [0, 333, 666, 999]
    assert spread(range(3), 4) == [0, 1, 2]


@pytest.mark.parametrize("values, whole", [([3, 3, 5, 9], True), ([0.25, 0.5, 0.5, 1.0], False), ([7, 7], True)])
def test_a_histogram_holds_all_its_values_between_the_least_and_the_greatest(values: list[float], whole: bool) -> None:
    (outline,) = histogram([values], whole=whole)
    edges, shares = zip(*outline[1:-2], strict=True)
    assert sum(shares) == pytest.approx(1) and edges[0] == min(values) and outline[-1][1] == 0
    assert edges[-1] <= max(values) <= outline[-1][0]


def test_whole_numbers_have_bins_of_whole_numbers() -> None:
    (outline,) = histogram([[1, 2, 2, 4]], whole=True)
    assert outline[1:-2] == [(1, 0.25), (2, 0.5), (3, 0), (4, 0.25)]
