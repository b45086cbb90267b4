"""group_advantages against cases worked by hand and plain Python in float64."""

import math
import statistics

import pytest
import torch
from devices import seeded

from rlhf_fast.ops import group_advantages
from rlhf_fast.ops.group_advantages import ESTIMATORS

REWARDS = [1.0, 0.0, 2.0, 5.0, 5.0, 3.0]
GROUPS = torch.tensor([7, -2, 7, -2, 7, 4])  # rewards 1, 2, 5 and 0, 5, and 3 alone


def standardised(values: list[float], epsilon: float) -> list[float]:
    mean, std = statistics.mean(values), statistics.stdev(values)
    return [(value - mean) / (std + epsilon) for value in values]


# mean 8/3 and std sqrt(13/3); mean 5/2 and std 5/sqrt(2); of all: mean 8/3
CENTRED = [1 - 8 / 3, -2.5, 2 - 8 / 3, 2.5, 5 - 8 / 3, 0.0]
BY_HAND = {
    "grpo": [
        -5 / 3 / math.sqrt(13 / 3), -math.sqrt(0.5), -2 / 3 / math.sqrt(13 / 3), math.sqrt(0.5),
        7 / 3 / math.sqrt(13 / 3), 0.0,
    ],
    "dr_grpo": CENTRED,
    "rloo": [1 - 3.5, -5.0, 2 - 3.0, 5.0, 5 - 1.5, 0.0],
    "reinforce++": standardised(REWARDS, 0.0),
    "reinforce++-baseline": [value / statistics.stdev(CENTRED) for value in CENTRED],
}  # fmt: skip


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_by_hand(estimator: str) -> None:
    for dtype, precision in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)):
        rewards = torch.tensor(REWARDS, dtype=dtype, requires_grad=True)
        result = group_advantages(rewards, GROUPS, estimator=estimator, epsilon=0)
        assert result.tolist() == pytest.approx(BY_HAND[estimator], rel=precision, abs=precision)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not result.requires_grad


def test_epsilon_is_added_to_the_standard_deviation() -> None:
    result = group_advantages(torch.tensor([0.0, 2.0]), 2, epsilon=0.5)
    assert result.tolist() == pytest.approx([-1 / (math.sqrt(2) + 0.5), 1 / (math.sqrt(2) + 0.5)])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_of_one_size_in_any_order(estimator: str) -> None:
    rewards = torch.randn(12, generator=seeded(0), dtype=torch.float64)
    expected = group_advantages(rewards, 4, estimator=estimator)
    order = torch.randperm(12, generator=seeded(1))
    shuffled = group_advantages(rewards[order], (torch.arange(12) // 4 * 10)[order], estimator=estimator)
    torch.testing.assert_close(shuffled, expected[order])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("reward", [0.1, -1e6, 0.0])
def test_equal_rewards_teach_nothing(estimator: str, reward: float) -> None:
    for size in (1, 3):
        rewards = torch.full((6,), reward)
        assert group_advantages(rewards, size, estimator=estimator, epsilon=0).tolist() == [0.0] * 6


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_large_offset_loses_no_digits(estimator: str) -> None:
    small = torch.tensor([0.0, 1.0, 3.0, 0.0])
    expected = group_advantages(small, 2, estimator=estimator)
    torch.testing.assert_close(group_advantages(small + 2.0**20, 2, estimator=estimator), expected)


def test_nan_stays_in_its_group() -> None:
    rewards = torch.tensor([torch.nan, 1.0, 2.0, 3.0])
    for estimator in ("grpo", "dr_grpo", "rloo"):
        assert group_advantages(rewards, 2, estimator=estimator).isnan().tolist() == [True, True, False, False]
    assert group_advantages(rewards, 2, estimator="reinforce++").isnan().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_responses(estimator: str) -> None:
    assert group_advantages(torch.empty(0), 4, estimator=estimator).shape == (0,)
    assert group_advantages(torch.empty(0), torch.empty(0, dtype=torch.int64), estimator=estimator).shape == (0,)


def test_bad_arguments() -> None:
    rewards = torch.zeros(6)
    with pytest.raises(ValueError, match=r"rewards must have shape \(N,\).*got \(2, 3\)"):
        group_advantages(rewards.view(2, 3), 3)
    for size in (0, -1, 4):
        with pytest.raises(ValueError, match=f"a size that divides N = 6; got {size}"):
            group_advantages(rewards, size)
    with pytest.raises(TypeError, match="groups must hold integers"):
        group_advantages(rewards, rewards)
    with pytest.raises(ValueError, match=r"groups must have shape \(6,\)"):
        group_advantages(rewards, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="estimator must be one of grpo, .*; got 'gae'"):
        group_advantages(rewards, 2, estimator="gae")
    with pytest.raises(ValueError, match="epsilon must be a finite number >= 0"):
        group_advantages(rewards, 2, epsilon=-1e-6)
    with pytest.raises(TypeError, match="rewards must be float64"):
        group_advantages(rewards.long(), 2)
