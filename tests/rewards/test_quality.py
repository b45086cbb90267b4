"""The figures of a reward model on constructed pairs, against hand-worked and published values."""

import math

import pytest
import torch

from rlhf_fast.rewards import Quality, assess
from rlhf_fast.rewards.quality import wilson


def assessed(margins: list[float], lengths: list[float] | None = None) -> Quality:
    chosen = torch.tensor(margins, dtype=torch.float64)
    return assess(chosen, torch.zeros_like(chosen), torch.tensor(lengths or [0.0] * len(margins)))


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:857-872), table I, method 3: the score method, as printed
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_the_published_one(successes: int, count: int, low: float, high: float) -> None:
    got = wilson(successes, count)
    assert got[0] == pytest.approx(low, abs=5e-5) and got[1] == pytest.approx(high, abs=5e-5)
    mirrored = wilson(count - successes, count)
    assert mirrored[0] == pytest.approx(1 - high, abs=5e-5) and mirrored[1] == pytest.approx(1 - low, abs=5e-5)


def test_accuracy_counts_a_tie_as_half() -> None:
    quality = assessed([2.0, 1.0, -1.0, 0.0])
    assert (quality.pairs, quality.accuracy, quality.margin) == (4, 0.625, 0.5)
    assert (quality.accuracy_low, quality.accuracy_high) == wilson(2.5, 4)


def test_the_loss_is_the_mean_of_minus_log_sigmoid() -> None:
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 2
    assert assessed([2.0, -1.0]).loss == pytest.approx(expected, rel=1e-12)
    assert assessed([2000.0]).loss == 0.0
    assert assessed([-2000.0]).loss == 2000.0


def test_the_margin_is_chosen_minus_rejected_in_double_precision() -> None:
    quality = assess(torch.tensor([1e4 + 0.5]), torch.tensor([1e4]), torch.tensor([1]))
    assert quality.margin == 0.5


# ---- buckets -------------------------------------------------------------------------------------------------------


def test_buckets_are_fifths_by_size_of_margin() -> None:
    margins = [5.0, -0.1, 0.2, 3.0, -0.4, 1.0, 2.0, 0.6, -4.0, 0.8]
    assert assessed(margins).margin_buckets == [
        {"low": 0.1, "high": 0.2, "accuracy": 0.5, "count": 2},
        {"low": 0.4, "high": 0.6, "accuracy": 0.5, "count": 2},
        {"low": 0.8, "high": 1.0, "accuracy": 1.0, "count": 2},
        {"low": 2.0, "high": 3.0, "accuracy": 1.0, "count": 2},
        {"low": 4.0, "high": 5.0, "accuracy": 0.5, "count": 2},
    ]


def test_fewer_pairs_than_buckets_leave_no_empty_bucket() -> None:
    buckets = assessed([1.0, -2.0]).margin_buckets
    assert [(bucket["low"], bucket["accuracy"], bucket["count"]) for bucket in buckets] == [
        (1.0, 1.0, 1),
        (2.0, 0.0, 1),
    ]


# ---- calibration ---------------------------------------------------------------------------------------------------


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_a_model_whose_confidence_comes_true_has_no_calibration_error() -> None:
    margins = [logit(0.75)] * 3 + [-logit(0.75)] + [logit(0.9)] * 9 + [-logit(0.9)]
    quality = assessed(margins)
    assert quality.calibration_error == pytest.approx(0.0, abs=1e-12)
    assert [(round(p["predicted"], 6), round(p["observed"], 6), p["count"]) for p in quality.reliability] == [
        (0.75, 0.75, 4),
        (0.9, 0.9, 10),
    ]


def test_overconfidence_is_measured_bin_by_bin() -> None:
    """Ten pairs at 0.9 of which half are right, thirty at 0.6 of which all are: (0.4·10 + 0.4·30)/40."""
    margins = [logit(0.91)] * 5 + [-logit(0.91)] * 5 + [logit(0.61)] * 30
    quality = assessed(margins)
    assert quality.calibration_error == pytest.approx((0.41 * 10 + 0.39 * 30) / 40, rel=1e-9)
    assert [p["count"] for p in quality.reliability] == [30, 10]


def test_the_bins_are_ten_from_one_half_to_one() -> None:
    edges = [0.501 + 0.05 * step for step in range(10)]
    quality = assessed([logit(p) for p in edges] + [100.0])
    assert [p["count"] for p in quality.reliability] == [1] * 9 + [2]  # certainty falls into the last bin
    assert quality.reliability[3]["predicted"] == pytest.approx(0.651)


# ---- length --------------------------------------------------------------------------------------------------------


def test_length_correlation_is_pearsons() -> None:
    margins, lengths = [1.0, -2.0, 0.5, 3.0], [4.0, -1.0, -3.0, 6.0]
    stacked = torch.tensor([margins, lengths], dtype=torch.float64)
    expected = torch.corrcoef(stacked)[0, 1].item()
    assert assessed(margins, lengths).length_correlation == pytest.approx(expected, rel=1e-12)
    assert assessed([1.0, 2.0], [10.0, 20.0]).length_correlation == pytest.approx(1.0)
    assert assessed([1.0, 2.0], [-10.0, -20.0]).length_correlation == pytest.approx(-1.0)


@pytest.mark.parametrize(("margins", "lengths"), [([1.0, 2.0], [3.0, 3.0]), ([1.0, 1.0], [3.0, 4.0]), ([1.0], [2.0])])
def test_where_nothing_varies_there_is_no_correlation(margins: list[float], lengths: list[float]) -> None:
    assert assessed(margins, lengths).length_correlation == 0.0


def test_length_accuracy_is_what_the_better_of_longer_and_shorter_would_reach() -> None:
    assert assessed([1.0] * 4, [5.0, 6.0, 7.0, -1.0]).length_accuracy == 0.75
    assert assessed([1.0] * 4, [-5.0, -6.0, -7.0, 1.0]).length_accuracy == 0.75
    assert assessed([1.0] * 4, [5.0, 6.0, -7.0, 0.0]).length_accuracy == 0.625


# ---- warnings ------------------------------------------------------------------------------------------------------


def varied(right: int, wrong: int) -> Quality:
    """Equal lengths carry no information."""
    return assessed([1.0] * right + [-1.0] * wrong)


def test_a_healthy_model_is_not_warned_of() -> None:
    assert varied(75, 25).warnings() == []
    assert varied(9, 1).warnings() == []  # 90%, but of ten pairs: the interval reaches into the healthy


def test_far_too_good_far_too_bad_and_length_are_said() -> None:
    (leak,) = varied(198, 2).warnings()
    assert "99.0% is above 85%" in leak and "length alone reaches 50.0%" in leak
    assert varied(198, 2).warnings(ceiling=0.99) == []
    assert "is above 70%" in varied(90, 10).warnings(ceiling=0.7)[0]
    (poor,) = varied(100, 100).warnings()
    assert "50.0% is far below the 70-80%" in poor
    lengths = [10.0 * m for m in (2.0, 1.0, -1.0, 0.5)]
    (length,) = assessed([2.0, 1.0, -1.0, 0.5], lengths).warnings()
    assert "correlation +1.00" in length
