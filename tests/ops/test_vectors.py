"""The vector functions of the compiled engine, through the ops: exponentials over their whole range, and half types."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast import ops

every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
pytestmark = pytest.mark.usefixtures("cpu_path")


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth) / truth).abs().max().item()


def magnitudes(low: float, high: float) -> Tensor:
    """Numbers of either sign from low to high, as many a decade, and as many a unit around 0."""
    by_decade = torch.logspace(math.log10(low), math.log10(high), 50001, dtype=torch.float64)
    by_unit = torch.linspace(0, min(high, 128), 50001, dtype=torch.float64)[1:]
    positive = torch.cat([by_decade[by_decade <= high], by_unit]).float()
    return torch.cat([positive, -positive])


def test_expm1_and_k3() -> None:
    """The estimator's slope at -x is -(e^x - 1), its value e^x - 1 - x."""
    x = magnitudes(1e-37, 150)
    leaf = (-x).requires_grad_()
    value = ops.token_kl(leaf, torch.zeros_like(x), estimator="k3")
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    exact = x.double()
    infinite = exact.exp() > torch.finfo(torch.float32).max
    assert torch.equal(value.isinf(), infinite) and torch.equal(slope, torch.where(infinite, -math.inf, slope))
    assert relative_error(-slope[~infinite], exact[~infinite].expm1()) < 1.3e-7

    small = x.abs() < 0.5
    k3 = torch.where(small, sum(exact**k / math.factorial(k) for k in range(2, 16)), exact.expm1() - exact)
    normal = ~infinite & (k3 > torch.finfo(torch.float32).tiny)
    assert relative_error(value.detach()[normal], k3[normal]) < 4e-7


def test_exp_of_the_ratio() -> None:
    """With an advantage of the other sign the unclipped branch applies: the gradient is the ratio, 0 past +-20."""
    x = magnitudes(1e-30, 20)
    leaf = torch.cat([x, x.new_tensor([-20.001, 20.001])])[None].requires_grad_()
    result = ops.clipped_policy_loss(leaf, torch.zeros_like(leaf), -leaf.detach().sign(), num_items=1)
    (grad,) = torch.autograd.grad(result.loss, leaf)
    assert relative_error(grad[0, :-2] * x.sign(), x.double().exp()) < 1e-7
    assert (grad[0, -2:] == 0).all()
    assert result.ratio_max.item() == pytest.approx(math.exp(20), rel=1e-7)


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_tanh_of_the_softcap(softcap: float) -> None:
    """Beside a logit 0, and at a temperature that makes 50 of the capped one, the log-prob is that -50."""
    logits = softcap * magnitudes(1e-34, 1e4)
    capped = softcap * (logits.double() / softcap).tanh()
    temperature = (capped.abs() / 50).float()
    rows = torch.stack([logits.clamp(max=0), logits.clamp(min=0)], dim=1)  # column 0, the target, is the lower one
    logprobs = ops.masked_logprobs(
        rows, torch.zeros(len(rows), dtype=torch.int64), temperature=temperature, softcap=softcap
    )
    assert relative_error(logprobs, -capped.abs() / temperature.double()) < 4e-7


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_exponential_of_a_row(temperature: float) -> None:
    """Every probability down to the smallest normal number, to what the rounding of its exponent costs, then 0."""
    gaps = torch.linspace(0, -110 * temperature, 20011)
    leaf = torch.cat([torch.zeros(1), gaps])[None].requires_grad_()
    (grad,) = torch.autograd.grad(ops.masked_logprobs(leaf, torch.tensor([0]), temperature=temperature).sum(), leaf)
    scaled = leaf.detach().double()[0] / temperature
    p = scaled.softmax(0)[1:]
    error = (-grad[0, 1:].double() * temperature - p).abs() / p
    normal = p > 2e-38 / min(temperature, 1.0)
    assert (error <= 4e-7 - 1.2e-7 * scaled[1:])[normal].all()
    assert (grad[0, 1:][scaled[1:] < -90] == 0).all()


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@every_half
def test_loads(dtype: torch.dtype) -> None:
    """Every number of the type, as the target's logit and as the other one's beside 0.

    At a temperature of an eighth of it, so that the log-prob tells a number from its neighbours however small it is.
    """
    x = every_pattern(dtype)
    temperature = x.float().abs().nan_to_num(1, posinf=1).clamp(min=1e-36, max=2.0**119) / 8
    log_odds = x.double() / temperature.double()
    logits = torch.stack([x, torch.zeros_like(x)], dim=1)
    for target, sign in ((0, 1), (1, -1)):
        targets = torch.full_like(x, target, dtype=torch.int64)
        truth = logsigmoid(sign * log_odds).masked_fill(x == math.inf, math.nan)
        ours = ops.masked_logprobs(logits, targets, temperature=temperature)
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-38, equal_nan=True)


@every_half
def test_stores_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """Every number of the type, every tie between two and the floats next to it, subnormals, overflow, inf and NaN.

    A target at -inf beside one finite logit has the gradient (g, -g), g that of the log-prob.
    """
    numbers = every_pattern(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    top = numbers[-1] + (numbers[-1] - numbers[-2]) / 2  # the first that rounds to infinity
    ties = torch.cat([ties, torch.stack([top, -top])])
    up, down = (torch.nextafter(ties, torch.tensor(end)) for end in (math.inf, -math.inf))
    g = torch.cat([numbers, ties, up, down, torch.tensor([math.inf, -math.inf, math.nan, 3e38, 1e-45])])

    columns = 33  # the finite logit wanders over the lanes of every vector
    place = torch.arange(len(g))[:, None] % (columns - 1)
    leaf = torch.full((len(g), columns), -math.inf, dtype=dtype).scatter_(1, place, 0.0).requires_grad_()
    logprobs = ops.masked_logprobs(leaf, torch.full((len(g),), columns - 1))
    (grad,) = torch.autograd.grad(logprobs, leaf, g)
    for ours, exact in ((grad[:, -1], g), (grad.gather(1, place)[:, 0], -g)):
        torch.testing.assert_close(ours, exact.to(dtype), rtol=0, atol=0, equal_nan=True)
