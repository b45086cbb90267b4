import math

import pytest
import torch

from rlhf_fast.ops import kto_loss

POLICY, REF = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-2.0, -2.0, -2.0])  # log ratios 1, -1, 0
DESIRABLE = torch.tensor([True, False, False])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_by_hand() -> None:
    """beta = 1/2 and kl = 0.4: 1 - sigmoid(0.3), and for the others 1 - sigmoid(0.7) and 1 - sigmoid(0.2), halved."""
    expected = [1 - sigmoid(0.3), 0.5 * (1 - sigmoid(0.7)), 0.5 * (1 - sigmoid(0.2))]
    policy, ref, kl = POLICY.clone().requires_grad_(), REF.clone().requires_grad_(), torch.tensor(0.4).requires_grad_()
    options = {"beta": 0.5, "undesirable_weight": 0.5}
    result = kto_loss(policy, ref, DESIRABLE, kl, **options)
    assert result.loss.item() == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert kto_loss(policy, ref, DESIRABLE, 0.4, **options, reduction="none").loss.tolist() == pytest.approx(expected)
    assert result.rewards.tolist() == [0.5, -0.5, 0.0] and not result.rewards.requires_grad
    result.loss.backward()
    slopes = [
        -0.5 * sigmoid(0.3) * sigmoid(-0.3),
        0.25 * sigmoid(0.7) * sigmoid(-0.7),
        0.25 * sigmoid(0.2) * sigmoid(-0.2),
    ]
    assert policy.grad.tolist() == pytest.approx([slope / 3 for slope in slopes], rel=1e-5)
    assert ref.grad is None and kl.grad is None


def test_without_a_kl_it_is_the_unpaired_apo_zero() -> None:
    losses = kto_loss(POLICY, REF, DESIRABLE, beta=0.5, reduction="none").loss
    assert losses.tolist() == pytest.approx([1 - sigmoid(0.5), sigmoid(-0.5), sigmoid(0.0)])


def test_no_responses() -> None:
    empty = torch.empty(0, requires_grad=True)
    result = kto_loss(empty, empty, torch.empty(0, dtype=torch.bool))
    result.loss.backward()
    assert result.loss.item() == 0 and result.rewards.shape == empty.grad.shape == (0,)


def test_half_precision_is_computed_in_float32() -> None:
    result = kto_loss(POLICY.bfloat16(), REF.bfloat16(), DESIRABLE)
    assert torch.equal(result.loss, kto_loss(POLICY, REF, DESIRABLE).loss)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="desirable must be bool; got torch.int64"):
        kto_loss(POLICY, REF, DESIRABLE.long())
    with pytest.raises(ValueError, match=r"ref must have shape \(3,\)"):
        kto_loss(POLICY, REF[:2], DESIRABLE)
    with pytest.raises(ValueError, match=r"policy must have shape \(N,\)"):
        kto_loss(POLICY[None], REF[None], DESIRABLE[None])
    with pytest.raises(ValueError, match="kl must be a number or a 0-dim tensor; got shape"):
        kto_loss(POLICY, REF, DESIRABLE, torch.zeros(3))
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        kto_loss(POLICY, REF, DESIRABLE, beta=0.0)
    with pytest.raises(ValueError, match="undesirable_weight must be a finite number >= 0"):
        kto_loss(POLICY, REF, DESIRABLE, undesirable_weight=-1.0)
    with pytest.raises(ValueError, match="reduction must be one of mean, none; got 'sum'"):
        kto_loss(POLICY, REF, DESIRABLE, reduction="sum")
