"""The KL of an older policy's tokens has the gradient of KL(policy || reference)."""

import pytest
import torch
from devices import seeded

from rlhf_fast.ops import importance_weighted_kl


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_its_expectation_is_the_kl_and_so_is_that_of_its_gradient(estimator: str) -> None:
    """Over all 5 tokens that an older policy may sample, each with its probability."""
    logits, old, ref = torch.randn(3, 5, dtype=torch.float64, generator=seeded(0)).unbind()
    logits.requires_grad_()
    logprobs, old, ref = (each.log_softmax(-1) for each in (logits, old, ref))
    kl = (logprobs.exp() * (logprobs - ref)).sum()
    estimate = (old.exp() * importance_weighted_kl(logprobs, old, ref, estimator=estimator)).sum()
    torch.testing.assert_close(estimate, kl)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (estimate, kl)))


def test_bounds() -> None:
    """r = e and e^3, d = 1 and -2: k3 = e^-1 and e^2 - 3 = 4.39."""
    logprobs = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.0, 5.0], dtype=torch.float64)
    e = torch.e
    plain = importance_weighted_kl(logprobs, torch.zeros(2), ref)
    assert plain.tolist() == pytest.approx([e / e, e**3 * (e**2 - 3)])
    (grad,) = torch.autograd.grad(plain.sum(), logprobs)
    assert grad.tolist() == pytest.approx([e, -2 * e**3])  # r d
    bounded = importance_weighted_kl(logprobs, torch.zeros(2), ref, max_ratio=4.0, max_kl=1.0)
    assert bounded.tolist() == pytest.approx([1.0, 4.0])
    (grad,) = torch.autograd.grad(bounded.sum(), logprobs)
    assert grad.tolist() == pytest.approx([e, 0])


def test_bad_arguments() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="importance_weighted_kl: estimator must be one of k1, k2, k3; got 'k3\\+'"):
        importance_weighted_kl(x, x, x, estimator="k3+")
    with pytest.raises(ValueError, match="importance_weighted_kl: max_kl must be a finite number > 0; got 0"):
        importance_weighted_kl(x, x, x, max_kl=0)


def test_masked_tokens_are_not_read() -> None:
    logprobs, old, ref = torch.randn(3, 2, 4, generator=seeded(0)).unbind()
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]])
    poisoned = [each.masked_fill(mask == 0, torch.nan) for each in (logprobs, old, ref)]
    poisoned[0].requires_grad_()
    kl = importance_weighted_kl(*poisoned, mask, max_ratio=3.0, max_kl=5.0)
    assert torch.equal(kl, importance_weighted_kl(logprobs, old, ref, max_ratio=3.0, max_kl=5.0) * mask)
    (grad,) = torch.autograd.grad(kl.sum(), poisoned[0])
    assert grad.isfinite().all() and not grad[mask == 0].any()
    assert importance_weighted_kl(poisoned[0], old, ref).isnan().sum() == 3
