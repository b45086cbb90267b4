"""DPPO, Clip-Cov and KL-Cov: cases worked by hand, and against the papers' formulas. The edge cases of DPPO are in
op_table.py, those of the two that depend on ranks or chance are here.
"""

import math

import pytest
import torch
from devices import seeded

from rlhf_fast.ops import aggregate, clip_cov_loss, clipped_policy_loss, dppo_loss, kl_cov_loss


def sample(rows: int = 4, length: int = 6) -> tuple[torch.Tensor, ...]:
    """logprobs, old_logprobs, advantages, mask; every log-prob < 0."""
    generator = seeded(0)
    old, noise, advantages = torch.randn(3, rows, length, generator=generator, dtype=torch.float64).unbind()
    old = -old.abs() - 0.1
    mask = torch.rand(rows, length, generator=generator) < 0.8
    return (old + 0.5 * noise).clamp(max=-0.01).requires_grad_(), old, advantages, mask


def agree(own: torch.Tensor, true: torch.Tensor, by: torch.Tensor) -> None:
    torch.testing.assert_close(own, true)
    torch.testing.assert_close(*(torch.autograd.grad(each, by, retain_graph=True)[0] for each in (own, true)))


# ---- DPPO -----------------------------------------------------------------------------------------------------------


def test_dppo_by_hand() -> None:
    """p and q of four tokens: a large rise with A > 0 and a large fall with A < 0 are outside, the others inside."""
    p, q = torch.tensor([0.9, 0.55, 0.1, 0.8]), torch.full((4,), 0.5)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    logprobs = p.log().requires_grad_()
    result = dppo_loss(logprobs, q.log(), advantages, max_ratio=1.5)
    assert result.clip_fraction.item() == 0.5
    (grad,) = torch.autograd.grad(result.loss, logprobs)
    assert grad.tolist() == pytest.approx([0, -1.1 / 4, 0, 1.5 / 4])
    assert result.loss.item() == pytest.approx((-1.1 * math.log(0.55) + 1.5 * math.log(0.8)) / 4)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_is_the_papers_mask(divergence: str) -> None:
    logprobs, old, advantages, mask = sample()
    p, q = logprobs.detach().exp(), old.exp()
    distance = (p - q).abs() if divergence == "tv" else q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    away = (advantages > 0) & (p > q) & (distance > 0.05) | (advantages <= 0) & (p < q) & (distance > 0.02)
    assert 0 < away[mask].float().mean() < 1
    result = dppo_loss(logprobs, old, advantages, mask, divergence=divergence, clip_low=0.02, clip_high=0.05)
    agree(result.loss, aggregate(-(p / q) * advantages * logprobs * ~away, mask), logprobs)
    assert result.clip_fraction.item() == pytest.approx(away[mask].double().mean().item())


def test_dppo_at_probabilities_of_0_and_1() -> None:
    logprobs = torch.tensor([0.0, -math.inf, -math.inf], requires_grad=True)
    old = torch.tensor([math.log(0.5), math.log(0.5), 0.0])
    for divergence in ("tv", "kl"):
        result = dppo_loss(logprobs, old, torch.tensor([1.0, -1.0, -1.0]), divergence=divergence)
        assert result.loss.item() == 0 and result.clip_fraction.item() == 1
        assert not torch.autograd.grad(result.loss, logprobs)[0].any()


# ---- the covariance of advantage and log-prob -----------------------------------------------------------------------


def covariance(logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logprobs = logprobs.detach()
    return (advantages - advantages[mask].mean()) * (logprobs - logprobs[mask].mean())


def test_clip_cov_drops_the_tokens_between_the_bounds() -> None:
    """With a share of 1 chance has no part."""
    logprobs, old, advantages, mask = sample()
    ratio = (logprobs - old).exp()
    plain, bound = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.3)
    chosen = covariance(logprobs, advantages, mask)
    chosen = (chosen > 0.1) & (chosen < 1.0) & ~(bound > plain) & mask
    assert 1 < chosen.sum() < mask.sum()
    result = clip_cov_loss(
        logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.3, cov_ratio=1.0, cov_low=0.1, cov_high=1.0
    )
    agree(result.loss, aggregate(torch.maximum(plain, bound) * ~chosen, mask), logprobs)
    assert result.clip_fraction.item() == pytest.approx(chosen[mask].double().mean().item())
    weights = torch.linspace(0.1, 2, mask.numel(), dtype=torch.float64).view_as(mask).masked_fill(~mask, math.nan)
    weighted = clip_cov_loss(
        logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.3, cov_ratio=1.0, cov_low=0.1, cov_high=1.0,
        weights=weights,
    )  # fmt: skip
    agree(weighted.loss, aggregate(torch.maximum(plain, bound) * ~chosen, mask, weights=weights), logprobs)


def test_clip_cov_drops_as_many_as_asked_for_by_chance() -> None:
    logprobs, old, advantages, mask = sample(20, 30)
    options = {"cov_ratio": 0.05, "cov_low": 0.0, "clip_low": 1.0, "clip_high": 9.0}
    clipped = clipped_policy_loss(logprobs, old, advantages, mask, clip_low=1.0, clip_high=9.0).loss
    (plain,) = torch.autograd.grad(clipped, logprobs)
    dropped = []
    for seed in (1, 1, 2):
        result = clip_cov_loss(logprobs, old, advantages, mask, generator=seeded(seed), **options)
        (grad,) = torch.autograd.grad(result.loss, logprobs)
        dropped.append((grad == 0) & (plain != 0))
        torch.testing.assert_close(grad, plain.masked_fill(dropped[-1], 0.0))
    assert all(each.sum() == int(0.05 * mask.sum()) > 1 for each in dropped)
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[0], dropped[2])
    assert (covariance(logprobs, advantages, mask)[dropped[0]] > 0).all()


@pytest.mark.parametrize("masked", [True, False])
def test_kl_cov_is_the_papers_penalty(masked: bool) -> None:
    logprobs, old, advantages, mask = sample()
    mask = mask if masked else torch.ones_like(mask)
    values = covariance(logprobs, advantages, mask)
    count = int(0.3 * mask.sum())
    chosen = mask & (values >= values[mask].sort().values[-count])
    penalty = 0.7 * (logprobs - old).abs() * chosen
    result = kl_cov_loss(logprobs, old, advantages, mask if masked else None, cov_ratio=0.3, kl_coef=0.7)
    agree(result.loss, aggregate(-advantages * (logprobs - old).exp() + penalty, mask), logprobs)
    assert result.clip_fraction.item() == pytest.approx(count / mask.sum().item())


@pytest.mark.parametrize("loss_of", [dppo_loss, clip_cov_loss, kl_cov_loss])
def test_masked_tokens_are_not_read_and_nothing_live_is_0(loss_of: object) -> None:
    logprobs, old, advantages, mask = sample()
    clean = loss_of(logprobs, old, advantages, mask)
    poisoned = [each.detach().masked_fill(~mask, math.nan) for each in (logprobs, old, advantages)]
    again = loss_of(poisoned[0].requires_grad_(), *poisoned[1:], mask)
    assert torch.equal(again.loss, clean.loss)
    (grad,) = torch.autograd.grad(again.loss, poisoned[0])
    assert grad.isfinite().all() and not grad[~mask].any()
    nothing = loss_of(poisoned[0], *poisoned[1:], torch.zeros_like(mask))
    assert all(number.item() == 0 for number in nothing)
    logprobs = logprobs.detach().index_fill(0, torch.tensor([0]), math.nan)
    assert loss_of(logprobs, old, advantages, mask).loss.isnan()
    empty = torch.zeros(0, 5)
    assert loss_of(empty, empty, empty).loss.item() == 0


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="dppo_loss: divergence must be one of tv, kl; got 'js'"):
        dppo_loss(x, x, x, divergence="js")
    with pytest.raises(ValueError, match="dppo_loss: max_ratio must be a finite number > 0; got 0"):
        dppo_loss(x, x, x, max_ratio=0)
    with pytest.raises(ValueError, match="clip_cov_loss: cov_low must be below cov_high; got 5 and 5"):
        clip_cov_loss(x, x, x, cov_low=5, cov_high=5)
    for loss_of in (clip_cov_loss, kl_cov_loss):
        for wrong in (0, 1.5):
            with pytest.raises(ValueError, match="cov_ratio must be"):
                loss_of(x, x, x, cov_ratio=wrong)
        with pytest.raises(ValueError, match=r"weights must have shape \(2, 3\)"):
            loss_of(x, x, x, weights=x[:1])
