import math

import pytest
import torch

from rlhf_fast.ops import clipped_policy_loss, truncated_importance_weights

# ratios 1/4, 1, 4 and 2, 8; the last token does not count
RATIOS = torch.tensor([[0.25, 1.0, 4.0], [2.0, 8.0, torch.nan]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
LOGPROBS, ROLLOUT = RATIOS.log(), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [[0.25, 1.0, 2.0], [2.0, 2.0, 0.0]]),
        ({"low": 0.5}, [[0.5, 1.0, 2.0], [2.0, 2.0, 0.0]]),
        ({"outside": "zero", "low": 0.5, "high": 5.0}, [[0.0, 1.0, 4.0], [2.0, 0.0, 0.0]]),
        ({"level": "sequence", "high": 10.0}, [[1.0, 1.0, 1.0], [10.0, 10.0, 0.0]]),
        ({"level": "sequence", "outside": "zero", "high": 10.0}, [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        ({"level": "sequence-mean", "high": math.inf}, [[1.0, 1.0, 1.0], [4.0, 4.0, 0.0]]),
    ],
    ids=str,
)
def test_by_hand(arguments: dict, expected: list[list[float]]) -> None:
    weights = truncated_importance_weights(LOGPROBS.clone().requires_grad_(), ROLLOUT, MASK, **arguments)
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert not weights.requires_grad


def test_a_bound_itself_is_inside() -> None:
    """At log ratio 0 the ratio is exactly 1."""
    zero = torch.zeros(1)
    for bounds in ({"low": 1.0, "high": 2.0}, {"high": 1.0}):
        assert truncated_importance_weights(zero, zero, outside="zero", **bounds).item() == 1.0


def test_weights_on_the_advantages_weigh_the_clipped_losses() -> None:
    logprobs, old, advantages = torch.randn(3, 4, 5, dtype=torch.float64).unbind()
    weights = truncated_importance_weights(old, old + 0.5 * torch.randn(4, 5, dtype=torch.float64))
    loss = clipped_policy_loss(logprobs, old, weights * advantages, dual_clip=2.0, num_items=1).loss
    parts = [
        weights[place] * clipped_policy_loss(logprobs[place], old[place], advantages[place], dual_clip=2.0).loss
        for place in ((i, j) for i in range(4) for j in range(5))
    ]
    torch.testing.assert_close(loss, torch.stack(parts).sum())


def test_an_extreme_ratio_is_finite() -> None:
    weights = truncated_importance_weights(torch.tensor([100.0, -100.0, -torch.inf]), torch.zeros(3), high=math.inf)
    torch.testing.assert_close(weights, torch.tensor([20.0, -20.0, -20.0]).exp())


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    for low, high in ((-0.1, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.nan), (math.inf, math.inf)):
        with pytest.raises(ValueError, match="low and high must be 0 <= low <= high"):
            truncated_importance_weights(x, x, low=low, high=high)
    with pytest.raises(ValueError, match="level must be one of token, sequence, sequence-mean; got 'row'"):
        truncated_importance_weights(x, x, level="row")
    with pytest.raises(ValueError, match="outside must be one of clip, zero; got 'mask'"):
        truncated_importance_weights(x, x, outside="mask")
    with pytest.raises(ValueError, match=r"'sequence' needs \(B, T\).*got shape \(6,\)"):
        truncated_importance_weights(x.flatten(), x.flatten(), level="sequence")
