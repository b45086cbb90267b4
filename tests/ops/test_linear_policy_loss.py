"""linear_policy_loss: a case worked by hand, and equality with its parts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rlhf_fast.ops import linear_policy_loss

pytestmark = pytest.mark.usefixtures("backend")

# logits (0, log 3): p = (1/4, 3/4)
WEIGHT = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
ENTROPY = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand() -> None:
    """Two live tokens of three, both sampled at probability 1/2.

    Target 1: ratio 3/2, advantage 2, clipped at 1.2: loss -2.4. Target 0: ratio 1/2, advantage 3, unclipped: -1.5.
    KL by k1 to a reference at probability 1/4: log 3 and 0.
    """
    hidden = torch.ones(1, 3, 1, dtype=torch.float64, requires_grad=True)
    half, quarter = math.log(1 / 2), math.log(1 / 4)
    result = linear_policy_loss(
        hidden,
        WEIGHT,
        torch.tensor([[1, 0, -100]]),
        tensor([[half, half, math.nan]]),
        tensor([[2.0, 3.0, math.nan]]),
        ref_logprobs=tensor([[quarter, quarter, math.nan]]),
        kl_coef=0.5,
        kl_estimator="k1",
        entropy_coef=0.1,
    )
    assert result.policy_loss.item() == pytest.approx((-2.4 - 1.5) / 2)
    assert result.kl.item() == pytest.approx(math.log(3) / 2)
    assert result.entropy.item() == pytest.approx(ENTROPY)
    assert result.loss.item() == pytest.approx((-2.4 - 1.5) / 2 + 0.5 * math.log(3) / 2 - 0.1 * ENTROPY)
    assert result.clip_fraction.item() == 0.5
    assert result.approx_kl.item() == pytest.approx((math.log(3 / 2) ** 2 + math.log(1 / 2) ** 2) / 4)
    assert result.ratio_mean.item() == pytest.approx(1.0)
    assert result.ratio_max.item() == pytest.approx(1.5)
    assert result.ratio_var.item() == pytest.approx(0.25)
    assert [output.requires_grad for output in result] == [True] + [False] * 8

    result.loss.backward()
    # d logp / d hidden is log 3 * (1/4) for target 1 and -log 3 * (3/4) for target 0, d entropy / d hidden is
    # log 3 * (-3/4) (log(3/4) + entropy); the policy term moves target 0 alone, by -advantage * ratio.
    log3 = math.log(3)
    entropy = 0.1 * log3 * 0.75 * (math.log(3 / 4) + ENTROPY)
    first = (0.5 * log3 / 4 + entropy) / 2
    second = (-1.5 * -log3 * 0.75 + 0.5 * -log3 * 0.75 + entropy) / 2
    torch.testing.assert_close(hidden.grad, tensor([[[first], [second], [0.0]]]))


def test_without_a_reference_there_is_no_kl() -> None:
    result = linear_policy_loss(tensor([[1.0]]), WEIGHT, torch.tensor([0]), tensor([-1.0]), tensor([1.0]))
    assert result.kl.item() == 0.0
    assert result.loss == result.policy_loss


def test_kl_without_a_weight_is_measured_and_left_out() -> None:
    arguments = (tensor([[1.0]]), WEIGHT, torch.tensor([0]), tensor([-1.0]), tensor([1.0]))
    result = linear_policy_loss(*arguments, ref_logprobs=tensor([-2.0]), kl_estimator="k1")
    assert result.kl.item() == pytest.approx(2 - math.log(4))
    assert result.loss == result.policy_loss


@pytest.mark.parametrize(
    ("aggregation", "divisors"),
    [("token-mean", [3, 3]), ("seq-mean-token-sum", [2, 2]), ("seq-mean-token-mean", [4, 2]),
     ("seq-mean-token-sum-norm", [4, 4])],
)  # fmt: skip
def test_every_term_is_aggregated_alike(aggregation: str, divisors: list[int]) -> None:
    """Sequences of 2 and 1 live tokens, T = 2. Ratios are 1, so that a token's policy loss is -advantage."""
    quarter = math.log(1 / 4)
    result = linear_policy_loss(
        torch.ones(2, 2, 1, dtype=torch.float64),
        WEIGHT,
        torch.zeros(2, 2, dtype=torch.int64),
        tensor([[quarter, quarter], [quarter, 0.0]]),
        tensor([[5.0, 2.0], [1.0, 9.0]]),
        torch.tensor([[1, 1], [1, 0]]),
        ref_logprobs=tensor([[quarter - 3, quarter], [quarter - 1, 9.0]]),
        kl_estimator="k1",
        aggregation=aggregation,
    )
    first, second = divisors
    assert result.policy_loss.item() == pytest.approx(-7 / first - 1 / second)
    assert result.kl.item() == pytest.approx(3 / first + 1 / second)
    assert result.entropy.item() == pytest.approx(2 * ENTROPY / first + ENTROPY / second)


def test_options_reach_the_loss() -> None:
    """Ratio 3 * 1/4 = 3/4 at advantage -1 with clip_low 0.1: 0.9; num_items 4 divides it. Dual clip at ratio 4."""
    one = (tensor([[1.0]]), WEIGHT, torch.tensor([0]))
    result = linear_policy_loss(*one, tensor([math.log(1 / 3)]), tensor([-1.0]), clip_low=0.1, num_items=4)
    assert result.loss.item() == pytest.approx(0.9 / 4)
    result = linear_policy_loss(*one, tensor([math.log(1 / 16)]), tensor([-1.0]), dual_clip=3.0)
    assert result.loss.item() == pytest.approx(3.0)
    result = linear_policy_loss(*one, tensor([math.log(1 / 6)]), tensor([1.0]), clip_high=0.4)
    assert result.loss.item() == pytest.approx(-1.4)


def test_a_sequence_ratio() -> None:
    """Ratios 3/2 and 1/2 a token: sqrt(3/4) for the sequence, within the clip."""
    half = math.log(1 / 2)
    result = linear_policy_loss(
        torch.ones(1, 2, 1, dtype=torch.float64), WEIGHT, torch.tensor([[1, 0]]), tensor([[half, half]]),
        tensor([[1.0, 1.0]]), ratio_level="sequence", aggregation="seq-mean-token-mean",
    )  # fmt: skip
    assert result.loss.item() == pytest.approx(-math.sqrt(3 / 4))


def test_a_frozen_head_and_terms_of_weight_zero_cost_nothing() -> None:
    hidden, targets = torch.ones(6, 1, dtype=torch.float64, requires_grad=True), torch.zeros(6, dtype=torch.int64)
    mask = torch.tensor([1, 1, 0, 0, 0, 1])
    with FlopCounterMode(display=False) as counter:
        linear_policy_loss(hidden, WEIGHT, targets, tensor([-1.0] * 6), tensor([1.0] * 6), mask).loss.backward()
    assert counter.get_total_flops() == 3 * (2 * 3 * 1 * 2)  # logits, again in the backward, d hidden; 3 live tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": 0.1}, "kl_coef=0.1 needs ref_logprobs"),
        ({"kl_coef": -0.1}, "kl_coef must be a finite number >= 0; got -0.1"),
        ({"entropy_coef": math.nan}, "entropy_coef must be a finite number >= 0; got nan"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of .* got 'k4'"),
        ({"aggregation": "seq-mean-token-sum"}, r"aggregation .* needs \(B, T\)"),
        ({"aggregation": "mean"}, "aggregation must be one of .* got 'mean'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_policy_loss: {message}"):
        linear_policy_loss(tensor([[1.0]]), WEIGHT, torch.tensor([0]), tensor([-1.0]), tensor([1.0]), **options)
