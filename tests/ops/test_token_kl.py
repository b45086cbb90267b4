from decimal import Decimal, localcontext

import pytest
import torch
from devices import seeded

from rlhf_fast.ops.token_kl import ESTIMATORS, token_kl

pytestmark = pytest.mark.usefixtures("backend")
LN2 = 0.6931471805599453

# With d = ln 2 and d = -ln 2, exp(-d) is 1/2 and 2:         value                    slope
BY_HAND = {
    "k1": [(LN2, 1.0), (-LN2, 1.0)],
    "k2": [(LN2**2 / 2, LN2), (LN2**2 / 2, -LN2)],
    "k3": [(0.5 - 1 + LN2, 0.5), (2 - 1 - LN2, -1.0)],
    "abs": [(LN2, 1.0), (LN2, -1.0)],
    "k1+": [(LN2, LN2), (-LN2, -LN2)],
    "k3+": [(0.5 - 1 + LN2, LN2), (2 - 1 - LN2, -LN2)],
    "abs+": [(LN2, LN2), (LN2, -LN2)],
}


def test_the_table_is_whole() -> None:
    assert set(BY_HAND) == set(ESTIMATORS)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_by_hand(estimator: str) -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    ref_logprobs = torch.tensor([-1 - LN2, -1 + LN2], requires_grad=True)
    kl = token_kl(logprobs, ref_logprobs, estimator=estimator)
    kl.sum().backward()
    values, slopes = zip(*BY_HAND[estimator], strict=True)
    torch.testing.assert_close(kl.detach(), torch.tensor(values), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logprobs.grad, torch.tensor(slopes), rtol=1e-6, atol=1e-7)
    assert ref_logprobs.grad is None


def test_the_default_is_k1() -> None:
    assert token_kl(torch.tensor([-1.0]), torch.tensor([-3.0])).item() == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_and_its_slope_keep_their_digits_from_tiny_to_large_differences(dtype: torch.dtype) -> None:
    sizes = torch.logspace(-12, 1.4, 200, dtype=dtype)
    # where the engines' e^x goes to another power of 2, and the torch reference from its series to expm1
    edge = torch.tensor([0.3465, 0.3466, 0.4999, 0.5, 0.5001], dtype=dtype)
    difference = torch.cat((sizes, -sizes, edge, -edge)).requires_grad_()
    kl = token_kl(difference, torch.zeros_like(difference), estimator="k3")
    kl.sum().backward()
    with localcontext() as context:
        context.prec = 60
        exact = [Decimal(d) for d in difference.tolist()]
        values = [float((-d).exp() - 1 + d) for d in exact]
        slopes = [float(1 - (-d).exp()) for d in exact]
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(kl.detach(), torch.tensor(values, dtype=dtype), rtol=tolerance, atol=0)
    torch.testing.assert_close(difference.grad, torch.tensor(slopes, dtype=dtype), rtol=tolerance, atol=0)


def test_expectations_under_the_policy() -> None:
    """Over the whole distribution: k1 and k3 average to KL; only the k2 slope averages to its gradient."""
    generator = seeded(1)
    scores = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    policy, ref = scores.log_softmax(0), torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    kl, reverse_kl = (policy.exp() * (policy - ref)).sum(), (ref.exp() * (ref - policy)).sum()
    (gradient,) = torch.autograd.grad(kl, scores, retain_graph=True)
    (reverse_gradient,) = torch.autograd.grad(reverse_kl, scores, retain_graph=True)
    expected = {
        "k1": (kl, torch.zeros(5, dtype=torch.float64)),
        "k1+": (kl, gradient),
        "k2": (None, gradient),
        "k3": (kl, reverse_gradient),
        "k3+": (kl, gradient),
        "abs+": (None, gradient),
    }
    for estimator, (value, slope) in expected.items():
        average = (policy.detach().exp() * token_kl(policy, ref, estimator=estimator)).sum()
        if value is not None:
            torch.testing.assert_close(average, value)
        torch.testing.assert_close(torch.autograd.grad(average, scores, retain_graph=True)[0], slope)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_gradcheck(estimator: str) -> None:
    generator = seeded(2)
    logprobs = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=generator) < 0.7
    assert torch.autograd.gradcheck(lambda x: token_kl(x, ref_logprobs, mask, estimator=estimator), logprobs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_masked_tokens_are_not_read(estimator: str, poison: float) -> None:
    mask = torch.tensor([[1, 0], [0, 1]])
    clean, ref = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([[-1.5, -2.5], [-2.5, -5.0]])
    logprobs = torch.where(mask == 1, clean, poison).requires_grad_()
    kl = token_kl(logprobs, torch.where(mask == 1, ref, poison), mask, estimator=estimator)
    kl.backward(torch.where(mask == 1, 1.0, poison))
    expected = token_kl(clean, ref, estimator=estimator)
    assert torch.equal(kl.detach(), torch.where(mask == 1, expected, 0.0))
    assert torch.equal(logprobs.grad[mask == 0], torch.zeros(2))
    assert torch.isfinite(logprobs.grad).all() and (logprobs.grad[mask == 1] != 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3), ()])
def test_empty_and_all_masked(estimator: str, shape: tuple[int, ...]) -> None:
    logprobs = torch.full(shape, torch.nan, requires_grad=True)
    kl = token_kl(logprobs, torch.zeros(shape), torch.zeros(shape), estimator=estimator)
    kl.sum().backward()
    assert torch.equal(kl, torch.zeros(shape)) and torch.equal(logprobs.grad, torch.zeros(shape))


def test_infinite_and_nan_live_tokens() -> None:
    inf = torch.inf
    ref = torch.tensor([-1.0, -inf, -1.0, -1.0])
    for estimator, first in (("k1", -inf), ("k2", inf), ("k3", inf), ("abs", inf)):
        logprobs = torch.tensor([-inf, -inf, torch.nan, -2.0], requires_grad=True)
        kl = token_kl(logprobs, ref, estimator=estimator)
        kl.sum().backward()
        assert kl[0].item() == first
        assert torch.isnan(kl[1:3]).all() and torch.isfinite(kl[3])
        assert torch.isfinite(logprobs.grad[3])
        assert torch.isfinite(logprobs.grad[0]) == (estimator in ("k1", "abs"))
    big = token_kl(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), estimator="k3")
    assert big.tolist() == [inf, 9999.0]  # exp(1e4) overflows float32; exp(-1e4) - 1 + 1e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_first(dtype: torch.dtype) -> None:
    logprobs = torch.tensor([-1.0, -2.5]).to(dtype).requires_grad_()
    ref = torch.tensor([-1.03125, -2.25])  # exact in both half types
    kl = token_kl(logprobs, ref.to(dtype), estimator="k3")
    kl.sum().backward()
    assert kl.dtype == torch.float32 and logprobs.grad.dtype == dtype
    assert torch.equal(kl, token_kl(logprobs.detach().float(), ref, estimator="k3"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_strides_and_position_change_no_bit(estimator: str) -> None:
    generator = seeded(3)
    logprobs, ref = torch.randn(2, 5, 7, generator=generator).unbind()
    mask = torch.rand(5, 7, generator=generator) < 0.7
    expected = token_kl(logprobs, ref, mask, estimator=estimator)
    transposed = token_kl(logprobs.T, ref.T.contiguous(), mask.T, estimator=estimator)
    assert torch.equal(transposed, expected.T)
    for row in range(5):
        assert torch.equal(token_kl(logprobs[row], ref[row], mask[row], estimator=estimator), expected[row])
    expanded = token_kl(logprobs[:1].expand(5, 7), ref, mask, estimator=estimator)
    assert torch.equal(expanded, token_kl(logprobs[:1].repeat(5, 1), ref, mask, estimator=estimator))


def test_nothing_is_kept_when_no_gradient_is_needed() -> None:
    ref_logprobs = torch.zeros(2, requires_grad=True)  # still a constant
    assert not token_kl(torch.zeros(2), ref_logprobs).requires_grad
    with torch.no_grad():
        assert token_kl(ref_logprobs, ref_logprobs).grad_fn is None


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="estimator must be one of k1, k2, k3.*'k4'"):
        token_kl(x, x, estimator="k4")
    with pytest.raises(ValueError, match=r"ref_logprobs must have shape \(2, 3\).*got \(3,\)"):
        token_kl(x, x[0])
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\).*got \(2,\)"):
        token_kl(x, x, torch.ones(2))
    with pytest.raises(TypeError, match="logprobs must be float64.*torch.int64"):
        token_kl(x.long(), x)
    with pytest.raises(TypeError, match="ref_logprobs must be a torch.Tensor; got float"):
        token_kl(x, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one device; got logprobs on (cpu|cuda:0), ref_logprobs on meta"):
        token_kl(x, x.to("meta"))
