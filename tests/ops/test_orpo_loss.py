import math

import pytest
import torch

from rlhf_fast.ops import orpo_loss


def test_by_hand() -> None:
    """p = 3/4 against 1/2: odds 3 and 1, -log(3 / (3 + 1)). p = 1/5 against 1/2: odds 1/4 and 1, -log(1/5)."""
    chosen, rejected = torch.tensor([0.75, 0.2]).log(), torch.tensor([0.5, 0.5]).log()
    expected = [math.log(4 / 3), math.log(5)]
    assert orpo_loss(chosen, rejected, reduction="none").tolist() == pytest.approx(expected, rel=1e-6)
    assert orpo_loss(chosen, rejected).item() == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_no_digits_are_lost_near_probability_0_and_1() -> None:
    """log odds(p) is x - log(1 - e^x): about -log(-x) for x near 0, and x for very negative x."""
    for x, log_odds in ((-1e-6, math.log(1e6) - 0.5e-6), (-50.0, -50.0)):
        logprobs = torch.tensor([x], requires_grad=True)
        loss = orpo_loss(logprobs, torch.tensor([0.5]).log())
        loss.backward()
        assert loss.item() == pytest.approx(math.log1p(math.exp(-log_odds)), rel=1e-5)
        # d log odds / dx = 1 / (1 - e^x)
        slope = -1 / (1 + math.exp(log_odds)) / -math.expm1(x)
        assert logprobs.grad.item() == pytest.approx(slope, rel=1e-5)


def test_gradcheck_and_no_pairs() -> None:
    chosen, rejected = (-torch.rand(2, 5, dtype=torch.float64) * 2 - 0.1).unbind()
    assert torch.autograd.gradcheck(orpo_loss, (chosen.requires_grad_(), rejected.requires_grad_()))
    empty = torch.empty(0, requires_grad=True)
    loss = orpo_loss(empty, empty)
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == (0,)


def test_bad_arguments() -> None:
    x = -torch.ones(3)
    with pytest.raises(ValueError, match=r"chosen must have shape \(N,\)"):
        orpo_loss(x[None], x[None])
    with pytest.raises(ValueError, match=r"rejected must have shape \(3,\)"):
        orpo_loss(x, x[:2])
    with pytest.raises(ValueError, match="reduction must be one of mean, none"):
        orpo_loss(x, x, reduction="sum")
