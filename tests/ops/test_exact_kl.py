"""exact_kl: values done by hand, closeness to zero, and columns at minus infinity."""

import math

import pytest
import torch

from rlhf_fast.ops import _vocab, exact_kl

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = float("inf"), float("nan")


def test_two_columns_by_hand() -> None:
    """p = (1/2, 1/2), r = (1/4, 3/4): KL = log 2 - log(3) / 2; d KL / dx_j = p_j (log(p_j / r_j) - KL)."""
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    ref_logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
    kl = exact_kl(logits, ref_logits)
    truth = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl.item() == pytest.approx(truth, rel=1e-15)
    kl.sum().backward()
    slope = [[0.5 * (math.log(2) - truth), 0.5 * (math.log(2 / 3) - truth)]]
    torch.testing.assert_close(logits.grad, torch.tensor(slope, dtype=torch.float64))
    assert ref_logits.grad is None


def test_temperature_divides_both() -> None:
    logits, ref_logits = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    expected = exact_kl(logits / temperature[:, None], ref_logits / temperature[:, None])
    assert torch.equal(exact_kl(logits, ref_logits, temperature=temperature), expected)


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3])
def test_close_distributions_keep_their_digits(step: float) -> None:
    """fp32 against float64 on logits that differ by ``step``; the plain sum p (log p - log r) is lost below 1e-6."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 1000, generator=generator)
    ref_logits = logits + step * torch.randn(20, 1000, generator=generator)
    log_p, log_r = logits.double().log_softmax(-1), ref_logits.double().log_softmax(-1)
    truth = (log_p.exp() * (log_p - log_r)).sum(-1)
    ours = exact_kl(logits, ref_logits)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4 if step == 1e-3 else 2e-5, atol=0)


def test_never_negative_and_zero_for_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 300, generator=generator) * 5
    assert (exact_kl(logits, logits.clone()) == 0).all()
    assert (exact_kl(logits, logits + 1e-6 * torch.randn(500, 300, generator=generator)) >= 0).all()


def test_minus_infinity() -> None:
    """In both: nothing. In the policy alone: its r falls out, KL((1), (1/2)) = log 2. In the reference alone: +inf."""
    logits = torch.tensor([[0.3, -INF, 1.0], [0.0, -INF, -INF], [0.0, 0.0, -INF]], requires_grad=True)
    ref_logits = torch.tensor([[0.3, -INF, 2.0], [1.0, 1.0, -INF], [0.0, -INF, 0.0]])
    kl = exact_kl(logits, ref_logits)
    short = exact_kl(torch.tensor([[0.3, 1.0]]), torch.tensor([[0.3, 2.0]]))
    torch.testing.assert_close(kl[:1], short)
    assert kl[1].item() == pytest.approx(math.log(2), rel=1e-6)
    assert kl[2].item() == INF
    (grad,) = torch.autograd.grad(kl[:2].sum(), logits)
    assert grad[:2].isfinite().all()
    assert (grad[:2, 1] == 0).all()


@pytest.mark.parametrize("bad", [[-INF] * 3, [NAN, 0.0, 0.0], [INF, 0.0, 0.0]], ids=str)
@pytest.mark.parametrize("side", [0, 1])
def test_a_bad_row_is_nan_alone(bad: list[float], side: int) -> None:
    pair = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    clean = exact_kl(pair[0], pair[1])
    pair[side, 1] = torch.tensor(bad)
    kl = exact_kl(pair[0], pair[1])
    assert kl[1].isnan()
    assert torch.equal(kl[[0, 2]], clean[[0, 2]])


def test_far_apart() -> None:
    """p is sure of column 0, r of column 1, 2e4 away: KL = 2e4, with no overflow on the way."""
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    kl = exact_kl(logits, torch.tensor([[-1e4, 1e4]]))
    assert kl.item() == 2e4
    (grad,) = torch.autograd.grad(kl.sum(), logits)
    assert (grad == 0).all()


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ref_logits = torch.randn(2, 11, 7, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    whole = exact_kl(logits, ref_logits)
    monkeypatch.setattr(_vocab, "CHUNK_ELEMENTS", 20)
    assert torch.equal(exact_kl(logits, ref_logits), whole)


def test_two_dtypes() -> None:
    with pytest.raises(TypeError, match="ref_logits must be torch.float32 like logits; got torch.bfloat16"):
        exact_kl(torch.zeros(1, 2), torch.zeros(1, 2).bfloat16())
