"""GSPO, CISPO, SAPO, VESPO, GMPO and GPG: cases worked by hand, and what sets each apart from the clipped loss.
The formulas and edge cases of all but GPG are in op_table.py.
"""

import math

import pytest
import torch
from devices import seeded

from rlhf_fast.ops import (
    aggregate,
    cispo_loss,
    clipped_policy_loss,
    gmpo_loss,
    gpg_loss,
    gspo_loss,
    sapo_loss,
    vespo_loss,
)
from rlhf_fast.ops._aggregate import AGGREGATIONS

every_loss = pytest.mark.parametrize("loss_of", [gspo_loss, cispo_loss, sapo_loss, vespo_loss])


def sample(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """logprobs, old_logprobs, advantages, mask (3, 4)"""
    generator = seeded(0)
    old, noise, advantages = torch.randn(3, 3, 4, generator=generator, dtype=dtype).unbind()
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    return (old + 0.3 * noise).requires_grad_(), old, advantages, mask


def test_gspo_has_the_gradient_of_its_loss() -> None:
    """Two tokens with log ratios 0.1 and 0.3, s = e^0.2, advantages 1 and 3: the loss is -s (1 + 3) / 2, and each
    log-prob moves s by s / 2. GSPO-token moves each token's own term instead: -s / 2 and -3 s / 2.
    """
    logprobs = torch.tensor([[0.1, 0.3]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros_like(logprobs), torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    options = {"clip_low": 0.5, "clip_high": 0.5, "aggregation": "seq-mean-token-mean"}
    own = gspo_loss(logprobs, old, advantages, **options)
    token = clipped_policy_loss(logprobs, old, advantages, ratio_level="sequence", **options)
    s = math.exp(0.2)
    assert own.loss.item() == pytest.approx(-2 * s) and token.loss.item() == pytest.approx(-2 * s)
    assert torch.autograd.grad(own.loss, logprobs)[0][0].tolist() == pytest.approx([-s, -s])
    assert torch.autograd.grad(token.loss, logprobs)[0][0].tolist() == pytest.approx([-s / 2, -3 * s / 2])
    assert own.ratio_mean.item() == pytest.approx(s) and own.ratio_var.item() == pytest.approx(0)


def test_gspo_is_gspo_token_for_equal_advantages() -> None:
    logprobs, old, advantages, mask = sample()
    advantages = advantages[:, :1].expand(3, 4)
    options = {"clip_low": 0.1, "clip_high": 0.1, "aggregation": "seq-mean-token-mean", "dual_clip": 1.2}
    own = gspo_loss(logprobs, old, advantages, mask, **options)
    token = clipped_policy_loss(logprobs, old, advantages, mask, ratio_level="sequence", **options)
    for ours, theirs in ((own.loss, token.loss), (own.clip_fraction, token.clip_fraction)):
        torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(each.loss, logprobs)[0] for each in (own, token)]
    torch.testing.assert_close(*grads)


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    """Ratios 8 and 1/8 to weights 5 and 1/8: -w A logprob, with slope -w A."""
    logprobs = torch.tensor([math.log(8), -math.log(8)], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -1.0], dtype=torch.float64)
    result = cispo_loss(logprobs, torch.zeros(2), advantages)
    assert result.loss.item() == pytest.approx((-10 * math.log(8) - math.log(8) / 8) / 2)
    assert torch.autograd.grad(result.loss, logprobs)[0].tolist() == pytest.approx([-5.0, 1 / 16])
    assert result.clip_fraction.item() == 0.5 and result.ratio_max.item() == pytest.approx(8)
    bounded = cispo_loss(logprobs, torch.zeros(2), advantages, clip_low=0.5)
    assert torch.autograd.grad(bounded.loss, logprobs)[0].tolist() == pytest.approx([-5.0, 1 / 4])


def test_sapo_by_hand() -> None:
    """At ratio 1 the slope is -A; at ratio 2, t = 1 and A = 1 it is -4 s (1 - s) 2 with s = sigmoid(1)."""
    logprobs = torch.tensor([0.0, math.log(2)], dtype=torch.float64, requires_grad=True)
    result = sapo_loss(logprobs, torch.zeros(2), torch.tensor([-3.0, 1.0]), aggregation="token-mean", num_items=1)
    s = 1 / (1 + math.exp(-1))
    assert result.loss.item() == pytest.approx(3 * 2 / 1.05 - 4 * s)
    assert torch.autograd.grad(result.loss, logprobs)[0].tolist() == pytest.approx([3.0, -8 * s * (1 - s)])


def test_luspo_is_gspo_that_sums_over_tokens() -> None:
    """LUSPO (arXiv 2602.05261): the mean over sequences of length times the clipped term of the sequence's ratio."""
    logprobs, old, advantages, mask = sample()
    advantages = advantages[:, :1].expand(3, 4)
    options = {"clip_low": 0.1, "clip_high": 0.1, "aggregation": "seq-mean-token-sum"}
    own = gspo_loss(logprobs, old, advantages, mask, **options).loss
    length = mask.sum(-1)
    ratio = (((logprobs - old) * mask).sum(-1) / length.clamp(min=1)).exp()
    terms = torch.maximum(-advantages[:, 0] * ratio, -advantages[:, 0] * ratio.clamp(0.9, 1.1))
    paper = (length * terms).sum() / 2  # of two sequences with tokens
    torch.testing.assert_close(own, paper)
    torch.testing.assert_close(*(torch.autograd.grad(each, logprobs)[0] for each in (own, paper)))


def test_vespo_by_hand() -> None:
    """Two tokens with ratios 2 and 3/2, so w = 3; A = 1 and -1. Weights w^2 e^(3 (1 - w)) = 9 e^-6 and 27 e^-4."""
    logprobs = torch.tensor([[math.log(2), math.log(1.5)]], dtype=torch.float64, requires_grad=True)
    result = vespo_loss(logprobs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]))
    slopes = [-9 * math.exp(-6) / 2, 27 * math.exp(-4) / 2]
    assert torch.autograd.grad(result.loss, logprobs)[0][0].tolist() == pytest.approx(slopes)
    assert result.loss.item() == pytest.approx(slopes[0] * math.log(2) + slopes[1] * math.log(1.5))
    assert result.clip_fraction.item() == 0 and result.ratio_max.item() == pytest.approx(2)
    same = vespo_loss(logprobs, None, torch.tensor([[1.0, -1.0]]), k_positive=0.0, lambda_positive=7.0)
    assert torch.autograd.grad(same.loss, logprobs)[0][0].tolist() == pytest.approx([-0.5, 0.5])  # w = 1 weighs 1


def test_gmpo_by_hand() -> None:
    """Log ratios 0.5, 0.1 and -0.9 clipped to 0.4: with A = 2 the first is, with A = -1 the last. Then the means of the
    log ratios are (0.4 + 0.1 - 0.9) / 3 and (0.5 + 0.1 - 0.4) / 3; a clipped token has no slope."""
    logprobs = torch.tensor([[0.5, 0.1, -0.9]] * 2, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[2.0] * 3, [-1.0] * 3], dtype=torch.float64)
    result = gmpo_loss(logprobs, torch.zeros(2, 3), advantages)
    first, second = math.exp(-0.4 / 3), math.exp(0.2 / 3)
    assert result.loss.item() == pytest.approx((-2 * first + second) / 2)
    (grad,) = torch.autograd.grad(result.loss, logprobs)
    assert grad[0].tolist() == pytest.approx([0, -first / 3, -first / 3])
    assert grad[1].tolist() == pytest.approx([second / 6, second / 6, 0])
    assert result.clip_fraction.item() == pytest.approx(1 / 3)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert gmpo_loss(logprobs, torch.zeros(2, 3), advantages, mask).loss.item() == pytest.approx(-2 * first)
    assert gmpo_loss(logprobs, torch.zeros(2, 3), advantages, num_items=8).loss.item() == pytest.approx(
        (-2 * first + second) / 8
    )


def test_gpg_has_the_gradient_of_the_clipped_loss_at_ratio_1() -> None:
    logprobs, _, advantages, mask = sample()
    own = gpg_loss(logprobs, advantages, mask)
    torch.testing.assert_close(own, aggregate(-advantages * logprobs, mask))
    grads = [
        torch.autograd.grad(each, logprobs)[0]
        for each in (own, clipped_policy_loss(logprobs, None, advantages, mask).loss)
    ]
    torch.testing.assert_close(*grads)


@every_loss
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck_and_aggregations(loss_of: object, aggregation: str) -> None:
    logprobs, old, advantages, mask = sample()
    options = {"aggregation": aggregation, "num_items": 5}
    if loss_of not in (cispo_loss, vespo_loss):  # whose weight is a constant
        assert torch.autograd.gradcheck(lambda x: loss_of(x, old, advantages, mask, **options).loss, logprobs)
    whole = loss_of(logprobs, old, advantages, mask, **options).loss
    parts = [
        loss_of(*(each[part] for each in (logprobs, old, advantages, mask)), **options).loss
        for part in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


@every_loss
def test_without_old_logprobs_they_are_the_policys_own(loss_of: object) -> None:
    logprobs, _, advantages, mask = sample()
    given, own = (loss_of(logprobs, old, advantages, mask) for old in (logprobs.detach(), None))
    assert all(torch.equal(a, b) for a, b in zip(given, own, strict=True))
    assert own.ratio_mean.item() == 1 and own.ratio_max.item() == 1
    assert [number.requires_grad for number in own] == [True] + [False] * 5


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"gspo_loss: logprobs must have shape \(B, T\).*got \(6,\)"):
        gspo_loss(x.flatten(), x.flatten(), x.flatten())
    with pytest.raises(ValueError, match=r"cispo_loss: clip_low must be in \[0, 1\]; got 2"):
        cispo_loss(x, x, x, clip_low=2)
    with pytest.raises(ValueError, match="cispo_loss: clip_high must be a finite number >= 0"):
        cispo_loss(x, x, x, clip_high=math.inf)
    with pytest.raises(ValueError, match="sapo_loss: temperature_positive must be a finite number > 0"):
        sapo_loss(x, x, x, temperature_positive=0)
    with pytest.raises(ValueError, match="vespo_loss: lambda_negative must be a finite number >= 0; got -1"):
        vespo_loss(x, x, x, lambda_negative=-1)
    for loss_of in (vespo_loss, gmpo_loss):
        with pytest.raises(ValueError, match=r"logprobs must have shape \(B, T\)"):
            loss_of(x.flatten(), x.flatten(), x.flatten())
    with pytest.raises(ValueError, match="sapo_loss: aggregation must be one of"):
        sapo_loss(x, x, x, aggregation="sum")
