"""exact_kl: values done by hand, closeness to zero, and columns at minus infinity."""

import math

import pytest
import torch
from devices import interpreted, seeded
from torch import Tensor

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


@pytest.mark.parametrize("lead", [10.0, 16.0, 20.0])
def test_a_confident_policy_keeps_the_digits_of_its_gradient(lead: float) -> None:
    """In float32 the small columns vanish next to the 1 of the largest; its gradient is their sum."""
    logits = torch.tensor([[lead, 0.0, 1.0, -0.5]], requires_grad=True)
    ref_logits = torch.tensor([[lead - 1, 0.5, 0.3, -0.5]])
    (grad,) = torch.autograd.grad(exact_kl(logits, ref_logits).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    log_p, log_r = exact.log_softmax(-1), ref_logits.double().log_softmax(-1)
    (truth,) = torch.autograd.grad((log_p.exp() * (log_p - log_r)).sum(), exact)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3])
def test_close_distributions_keep_their_digits(step: float) -> None:
    """fp32 against float64 on logits that differ by ``step``; the plain sum p (log p - log r) is lost below 1e-6."""
    generator = seeded(0)
    logits = torch.randn(20, 1000, generator=generator)
    ref_logits = logits + step * torch.randn(20, 1000, generator=generator)
    log_p, log_r = logits.double().log_softmax(-1), ref_logits.double().log_softmax(-1)
    truth = (log_p.exp() * (log_p - log_r)).sum(-1)
    ours = exact_kl(logits, ref_logits)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4 if step == 1e-3 else 2e-5, atol=0)


def test_never_negative_and_zero_for_the_same(backend: str) -> None:
    generator = seeded(0)
    logits = torch.randn(20 if interpreted(backend) else 500, 300, generator=generator) * 5
    assert (exact_kl(logits, logits.clone()) == 0).all()
    assert (exact_kl(logits, logits + 1e-6 * torch.randn(logits.shape, generator=generator)) >= 0).all()


def test_the_same_pulls_nowhere() -> None:
    logits = (5 * torch.randn(50, 300, generator=seeded(0))).requires_grad_()
    (grad,) = torch.autograd.grad(exact_kl(logits, logits.detach().clone(), temperature=0.7).sum(), logits)
    assert (grad == 0).all()


@pytest.mark.parametrize(
    "ratio", [-60.0, -5.0, -0.7, -0.35, -0.01, -1e-4, 1e-4, 0.01, 0.34, 0.36, 0.99, 1.01, 5.0, 60.0]
)
def test_every_size_of_ratio(ratio: float, backend: str) -> None:
    """Two columns whose log odds differ by ``ratio``, from every start: each part of the sum has its own formula."""
    start = torch.linspace(-20, 20, 9 if interpreted(backend) else 81)
    logits = torch.stack([torch.zeros_like(start), start], dim=1)
    ref_logits = torch.stack([torch.zeros_like(start), start + ratio], dim=1)
    log_p, log_r = logits.double().log_softmax(-1), ref_logits.double().log_softmax(-1)
    step = log_r - log_p
    truth = (log_p.exp() * (torch.expm1(step) - step)).sum(-1)
    kl = exact_kl(logits, ref_logits)
    torch.testing.assert_close(kl.double(), truth, rtol=2e-5 + 2e-6 / abs(ratio), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_long_rows(order: str, dtype: torch.dtype) -> None:
    """5003 columns are several blocks of a kernel, with their largest in the last, the first or anywhere."""
    generator = seeded(0)
    logits = 4 * torch.randn(6, 5003, generator=generator)
    if order != "mixed":
        logits = logits.sort(dim=1, descending=order == "falling").values
    logits = torch.cat([logits[:3], logits[3:] - 5000]).to(dtype).requires_grad_()
    ref_logits = (logits + 0.5 * torch.randn(6, 5003, generator=generator)).detach().to(dtype)
    ref_logits[:, ::100] = -INF
    with torch.no_grad():
        logits[:, ::100] = -INF
    kl = exact_kl(logits, ref_logits, temperature=0.5)
    (grad,) = torch.autograd.grad(kl.sum(), logits)

    log_p, log_r = (2 * logits.detach().double()).log_softmax(-1), (2 * ref_logits.double()).log_softmax(-1)
    ratio = (log_p - log_r).nan_to_num(0.0)
    truth = (log_p.exp() * ratio).sum(-1)
    torch.testing.assert_close(kl.double(), truth, rtol=1e-5, atol=1e-9)
    true_grad = 2 * log_p.exp() * (ratio - truth[:, None])
    rounding = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    torch.testing.assert_close(grad.double(), true_grad, rtol=rounding, atol=2e-6)


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
    pair = torch.randn(2, 3, 3, generator=seeded(0))
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
    logits, ref_logits = torch.randn(2, 11, 7, generator=seeded(0)).requires_grad_().unbind()
    whole = exact_kl(logits, ref_logits)
    monkeypatch.setattr(_vocab, "CHUNK_ELEMENTS", 20)
    assert torch.equal(exact_kl(logits, ref_logits), whole)


def test_two_dtypes_meet_as_in_torch() -> None:
    """log 3 against log 1 of two columns beside an even reference: 3/4 log 3/2 + 1/4 log 1/2."""
    logits, even = torch.tensor([[0.0, -1.0986123]], requires_grad=True), torch.zeros(1, 2)
    for left, right in ((logits, even.bfloat16()), (logits, even.double()), (logits.double(), even.half())):
        kl = exact_kl(left, right)
        assert kl.dtype == torch.promote_types(left.dtype, right.dtype)
        assert kl.item() == pytest.approx(0.13081204)
        (grad,) = torch.autograd.grad(kl.sum(), logits)
        assert grad.dtype == torch.float32  # 3/4 (log 3/2 - KL), and its negative
        torch.testing.assert_close(grad, torch.tensor([[0.20598980, -0.20598980]]))


def test_in_place_backward_writes_into_the_logits() -> None:
    generator = seeded(0)
    leaf = torch.randn(2, 3, 7, generator=generator, requires_grad=True)
    ref_logits, mask = torch.randn(2, 3, 7, generator=generator), torch.tensor([[1, 0, 1], [1, 1, 0]])

    def gradient(inplace: bool) -> tuple[Tensor, Tensor]:
        logits = leaf * 1.0
        loss = exact_kl(logits, ref_logits, mask, temperature=0.7, inplace_backward=inplace).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        return grad, logits.detach()

    plain, kept = gradient(False)
    ours, overwritten = gradient(True)
    assert torch.equal(ours, plain)
    assert torch.equal(overwritten, plain)
    assert torch.equal(kept, leaf.detach())


def test_in_place_backward_of_shared_memory_is_right() -> None:
    """In place, the gradients of an expanded row must not overwrite each other."""
    row, ref_logits = torch.randn(5, generator=seeded(0), requires_grad=True), torch.randn(3, 5, generator=seeded(1))
    (ours,) = torch.autograd.grad(exact_kl(row.expand(3, 5), ref_logits, inplace_backward=True).sum(), row)
    (plain,) = torch.autograd.grad(exact_kl(row.expand(3, 5), ref_logits).sum(), row)
    assert torch.equal(ours, plain)


def test_a_second_in_place_backward_is_an_error() -> None:
    logits = torch.randn(2, 5, requires_grad=True) * 1.0
    loss = exact_kl(logits, torch.zeros(2, 5), inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="exact_kl: .* second one; pass inplace_backward=False"):
        loss.backward()
