import math

import pytest
import torch
from devices import seeded

from rlhf_fast.ops import aggregate
from rlhf_fast.ops._aggregate import AGGREGATIONS
from rlhf_fast.ops.clipped_policy_loss import PolicyLoss, clip_fractions, clipped_policy_loss

pytestmark = pytest.mark.usefixtures("backend")


def loss_and_gradient(ratios: list, advantages: list, **arguments: object) -> tuple[PolicyLoss, torch.Tensor]:
    """The loss at these ratios, and its gradient in the log-probs."""
    old_logprobs = torch.full_like(torch.tensor(ratios), -1.5)
    logprobs = (old_logprobs + torch.tensor(ratios).log()).requires_grad_()
    result = clipped_policy_loss(logprobs, old_logprobs, torch.tensor(advantages), **arguments)
    result.loss.backward()
    return result, logprobs.grad


def sample(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """logprobs, old_logprobs, advantages, mask; about a third of the ratios outside the default clip range."""
    generator = seeded(seed)
    old_logprobs, noise, advantages = torch.randn(3, *shape, generator=generator, dtype=dtype).unbind()
    mask = torch.rand(shape, generator=generator) < 0.7
    return old_logprobs + 0.2 * noise, old_logprobs, advantages, mask


def test_by_hand() -> None:
    # A:              1        1       -1       -1        2
    # r:              1.5      0.5      1.5      0.5      1
    # -A r:          -1.5     -0.5      1.5      0.5     -2
    # -A clip(r):    -1.2     -0.8      1.2      0.8     -2
    # max:           -1.2*    -0.5      1.5      0.8*    -2       * the clipped branch: gradient 0
    # d / d logprob:  0       -0.5      1.5      0       -2       (-A r)
    result, gradient = loss_and_gradient([1.5, 0.5, 1.5, 0.5, 1.0], [1.0, 1.0, -1.0, -1.0, 2.0])
    assert result.loss.item() == pytest.approx(-1.4 / 5, rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.5, 1.5, 0.0, -2.0]) / 5)
    assert result.clip_fraction.item() == pytest.approx(2 / 5)
    assert result.approx_kl.item() == pytest.approx(0.5 * 2 * (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 5, rel=1e-6)
    assert result.ratio_mean.item() == pytest.approx(1.0)
    assert result.ratio_max.item() == pytest.approx(1.5)
    assert result.ratio_var.item() == pytest.approx(4 * 0.25 / 5)


def test_clip_fractions_by_hand() -> None:
    # low: A = -1, r = 0.5.  high: A = 1, r = 1.5 and 5.  dual: A = -1, r = 5.  Not: A = 1, r = 0.5; A = -1, r = 1.5.
    ratios = torch.tensor([0.5, 1.5, 5.0, 5.0, 0.5, 1.5, torch.nan])
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0, -1.0, torch.nan])
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0])
    found = clip_fractions(ratios.log(), torch.zeros(7), advantages, mask, dual_clip=3.0)
    assert [each.item() for each in found] == pytest.approx([1 / 6, 2 / 6, 1 / 6])
    assert clip_fractions(ratios.log(), torch.zeros(7), advantages, mask).dual.item() == 0


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_clip_fractions_add_up(ratio_level: str) -> None:
    logprobs, old, advantages, mask = sample(0, 40, 6)
    options = {"clip_low": 0.1, "clip_high": 0.05, "dual_clip": 1.2, "ratio_level": ratio_level}
    found = clip_fractions(3 * logprobs, 3 * old, advantages, mask, **options)
    whole = clipped_policy_loss(3 * logprobs, 3 * old, advantages, mask, **options).clip_fraction
    assert all(each > 0 for each in found) and sum(found).item() == pytest.approx(whole.item())
    nothing = clip_fractions(logprobs, old, advantages, torch.zeros_like(mask), **options)
    assert all(each == 0 for each in nothing)


def test_each_side_has_its_own_clip_by_hand() -> None:
    # range 0.9 to 1.3:  A = 1, r = 1.25 is inside; r = 1.4 is cut to 1.3; A = -1, r = 0.95 is inside; 0.85 becomes 0.9
    result, gradient = loss_and_gradient([1.25, 1.4, 0.95, 0.85], [1.0, 1.0, -1.0, -1.0], clip_low=0.1, clip_high=0.3)
    assert result.loss.item() == pytest.approx((-1.25 - 1.3 + 0.95 + 0.9) / 4, rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([-1.25, 0.0, 0.95, 0.0]) / 4)
    assert result.clip_fraction.item() == 0.5


def test_dual_clip_by_hand() -> None:
    # c = 3.  A = -1, r = 5: max(5, 1.2) = 5 is held at 3, gradient 0.  A = -2, r = 2: 4 < 6 stays.
    # A = 1, r = 5: -1.2, clipped as usual.  A = -1, r = 0.5: 0.8, clipped as usual.
    result, gradient = loss_and_gradient([5.0, 2.0, 5.0, 0.5], [-1.0, -2.0, 1.0, -1.0], dual_clip=3.0)
    assert result.loss.item() == pytest.approx((3 + 4 - 1.2 + 0.8) / 4, rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 4.0, 0.0, 0.0]) / 4)
    assert result.clip_fraction.item() == 0.75


def test_sequence_ratio_by_hand() -> None:
    # row 0: live log ratios 0.1 and 0.3, mean 0.2, s = e^0.2 = 1.2214; inside a clip of 0.5; A = 1
    # row 1: -0.3, 0, 0.3, mean 0, s = 1; A = -2
    # token means -s and 2, loss (2 - s) / 2; d / d logprob: -s / (2 rows * 2 tokens), 2 / (2 rows * 3 tokens)
    log_ratios = torch.tensor([[0.1, 0.3, 9.0], [-0.3, 0.0, 0.3]])
    advantages = torch.tensor([[1.0, 1.0, 7.0], [-2.0, -2.0, -2.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    arguments = {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean"}
    logprobs = log_ratios.clone().requires_grad_()
    result = clipped_policy_loss(
        logprobs, torch.zeros(2, 3), advantages, mask, clip_low=0.5, clip_high=0.5, **arguments
    )
    result.loss.backward()
    s = math.exp(0.2)
    assert result.loss.item() == pytest.approx((2 - s) / 2, rel=1e-5)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-s / 4, -s / 4, 0], [1 / 3, 1 / 3, 1 / 3]]))
    assert result.clip_fraction.item() == 0
    assert result.ratio_max.item() == pytest.approx(s)
    assert result.ratio_mean.item() == pytest.approx((2 * s + 3) / 5)
    # approx_kl stays that of the tokens: squares 0.01, 0.09, 0.09, 0, 0.09
    assert result.approx_kl.item() == pytest.approx(0.5 * 0.28 / 5, rel=1e-5)

    # with the default clip of 0.2, s is past 1.2 although the first token's own ratio, e^0.1, is not: row 0 is cut
    logprobs.grad = None
    result = clipped_policy_loss(logprobs, torch.zeros(2, 3), advantages, mask, **arguments)
    result.loss.backward()
    assert result.loss.item() == pytest.approx((2 - 1.2) / 2, rel=1e-5)
    assert result.clip_fraction.item() == pytest.approx(2 / 5)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))


def test_the_first_update_has_ratio_one_exactly() -> None:
    logprobs, _, advantages, mask = sample(0, 4, 6)
    for level in ("token", "sequence"):
        result = clipped_policy_loss(logprobs, logprobs.clone(), advantages, mask, ratio_level=level)
        statistics = [number.item() for number in result[1:]]
        assert statistics == [0.0, 0.0, 1.0, 1.0, 0.0]
        torch.testing.assert_close(result.loss, -advantages[mask].mean())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_old_logprobs_they_are_the_policys_own(level: str) -> None:
    logprobs, _, advantages, mask = sample(0, 4, 6)
    logprobs.requires_grad_()
    given, own = (
        clipped_policy_loss(logprobs, old, advantages, mask, ratio_level=level) for old in (logprobs.detach(), None)
    )
    assert all(torch.equal(a, b) for a, b in zip(given, own, strict=True))
    (gradient,) = torch.autograd.grad(own.loss, logprobs)
    torch.testing.assert_close(gradient, torch.where(mask, -advantages / mask.sum(), 0.0))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("num_items", [None, 5])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dual_clip", [None, 1.1])
def test_the_aggregate_of_the_token_losses(
    dual_clip: float | None, level: str, num_items: int | None, aggregation: str
) -> None:
    """Value and gradient, of losses and their slopes written out token by token."""
    logprobs, old_logprobs, advantages, mask = sample(1, 3, 5)
    how = {"aggregation": aggregation, "num_items": num_items}
    result = clipped_policy_loss(
        logprobs.requires_grad_(), old_logprobs, advantages, mask, clip_high=0.3, dual_clip=dual_clip,
        ratio_level=level, **how,
    )  # fmt: skip
    losses, slopes = torch.empty(2, 3, 5)
    for i in range(3):
        log_ratios = [(logprobs[i, j] - old_logprobs[i, j]).item() for j in range(5)]
        live = [log_ratio for log_ratio, counts in zip(log_ratios, mask[i].tolist(), strict=True) if counts]
        for j in range(5):
            r, a = math.exp(log_ratios[j] if level == "token" else sum(live) / len(live)), advantages[i, j].item()
            loss = max(-a * r, -a * min(max(r, 0.8), 1.3))
            if dual_clip is not None and a < 0:
                loss = min(loss, -a * dual_clip)
            losses[i, j], slopes[i, j] = loss, -a * r if loss == -a * r else 0.0
    losses.requires_grad_()
    expected = aggregate(losses, mask, **how)  # by hand in test_aggregate
    torch.testing.assert_close(result.loss, expected)
    (weights,) = torch.autograd.grad(expected, losses)
    torch.testing.assert_close(torch.autograd.grad(result.loss, logprobs)[0], weights * slopes)


@pytest.mark.parametrize("dual_clip", [None, 1.1])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck_of_token_ratios(aggregation: str, dual_clip: float | None) -> None:
    logprobs, *rest = sample(2, 3, 5, dtype=torch.float64)
    arguments = {"aggregation": aggregation, "dual_clip": dual_clip}
    result = clipped_policy_loss(logprobs, *rest, **arguments)
    assert 0 < result.clip_fraction < 1  # both branches are checked
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(x, *rest, **arguments).loss, logprobs.requires_grad_()
    )


def test_gradcheck_of_sequence_ratios() -> None:
    """With one advantage a sequence and token means, the stop-gradient form has the true gradient of s A."""
    logprobs, old_logprobs, advantages, mask = sample(5, 6, 4, dtype=torch.float64)
    arguments = {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean", "clip_low": 0.05, "clip_high": 0.05}
    rest = (old_logprobs, advantages[:, :1].expand(6, 4), mask)
    assert 0 < clipped_policy_loss(logprobs, *rest, **arguments).clip_fraction < 1
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(x, *rest, **arguments).loss, logprobs.requires_grad_()
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_masked_tokens_are_not_read(level: str, aggregation: str, poison: float) -> None:
    logprobs, old_logprobs, advantages, mask = sample(4, 3, 5)
    arguments = {"ratio_level": level, "aggregation": aggregation, "dual_clip": 2.0}
    results, gradients = [], []
    for filler in (0.0, poison):
        filled = [torch.where(mask, tensor, filler) for tensor in (logprobs, old_logprobs, advantages)]
        leaf = filled[0].requires_grad_()
        results.append(clipped_policy_loss(leaf, *filled[1:], mask, **arguments))
        results[-1].loss.backward()
        gradients.append(leaf.grad)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(*gradients)
    assert (gradients[1][~mask] == 0).all() and (gradients[1][mask] != 0).any()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 3)])
def test_empty_and_all_masked(level: str, aggregation: str, shape: tuple[int, int]) -> None:
    logprobs = torch.full(shape, torch.nan, requires_grad=True)
    zeros = torch.zeros(shape)
    result = clipped_policy_loss(logprobs, zeros, zeros, zeros, ratio_level=level, aggregation=aggregation)
    result.loss.backward()
    assert [number.item() for number in result] == [0.0] * 6
    assert torch.equal(logprobs.grad, zeros)


def test_empty_flat() -> None:
    empty = torch.empty(0, requires_grad=True)
    result = clipped_policy_loss(empty, empty, empty)
    result.loss.backward()
    assert result.loss.item() == 0 and empty.grad.shape == (0,)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, torch.inf, -torch.inf])
def test_an_extreme_ratio_gives_finite_numbers(level: str, advantage: float, log_ratio: float) -> None:
    logprobs = torch.tensor([[log_ratio], [0.1]], requires_grad=True)
    result = clipped_policy_loss(logprobs, torch.zeros(2, 1), torch.full((2, 1), advantage), ratio_level=level)
    result.loss.backward()
    assert all(torch.isfinite(number) for number in result)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0], [-advantage * math.exp(0.1) / 2]]))


def test_the_bound_changes_nothing_below_it() -> None:
    result, gradient = loss_and_gradient([math.exp(19.0)], [-1.0])
    torch.testing.assert_close(result.loss.item(), math.exp(19.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.item(), math.exp(19.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("poisoned", range(3))
def test_a_live_nan_shows_in_the_loss_and_in_its_own_row_alone(level: str, poisoned: int) -> None:
    inputs = [torch.zeros(3, 1), torch.zeros(3, 1), torch.ones(3, 1)]
    inputs[poisoned][1] = torch.nan
    inputs[0].requires_grad_()
    result = clipped_policy_loss(*inputs, ratio_level=level)
    result.loss.backward()
    assert torch.isnan(result.loss)
    assert torch.isnan(inputs[0].grad).tolist() == [[False], [True], [False]]


def test_minus_infinity_in_both_is_nan() -> None:
    gone = torch.tensor([-torch.inf])
    assert torch.isnan(clipped_policy_loss(gone, gone, torch.ones(1)).loss)


def test_only_the_loss_and_only_logprobs_have_a_gradient() -> None:
    inputs = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    result = clipped_policy_loss(*inputs)
    result.loss.backward()
    assert [tensor.grad is None for tensor in inputs] == [False, True, True]
    assert [number.requires_grad for number in result] == [True] + [False] * 5
    assert all(number.dim() == 0 for number in result)
    with torch.no_grad():
        assert clipped_policy_loss(*inputs).loss.grad_fn is None


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_strides_and_dtypes(level: str) -> None:
    logprobs, old_logprobs, advantages, mask = sample(5, 4, 6)
    half = [tensor.bfloat16() for tensor in (logprobs, old_logprobs, advantages)]
    expected = clipped_policy_loss(*(tensor.float() for tensor in half), mask, ratio_level=level)
    for views in (half, [tensor.T.contiguous().T for tensor in half]):
        got = clipped_policy_loss(*views, mask.T.contiguous().T, ratio_level=level)
        assert all(number.dtype == torch.float32 for number in got)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    row = advantages[:, :1]
    expanded = clipped_policy_loss(logprobs, old_logprobs, row.expand(4, 6), mask, ratio_level=level)
    copied = clipped_policy_loss(logprobs, old_logprobs, row.repeat(1, 6), mask, ratio_level=level)
    assert all(torch.equal(a, b) for a, b in zip(expanded, copied, strict=True))
    double = clipped_policy_loss(logprobs.double(), old_logprobs, advantages, mask, ratio_level=level)
    assert all(number.dtype == torch.float64 for number in double)


def test_any_shape_will_do_for_token_ratios_and_token_mean() -> None:
    tensors = sample(6, 4, 6)
    expected = clipped_policy_loss(*tensors)
    for shape in ((24,), (2, 2, 6), (24, 1)):
        got = clipped_policy_loss(*(tensor.reshape(shape) for tensor in tensors))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    flat = torch.zeros(6)
    with pytest.raises(ValueError, match=r"ratio_level 'sequence' needs \(B, T\).*got shape \(6,\)"):
        clipped_policy_loss(flat, flat, flat, ratio_level="sequence")
    with pytest.raises(ValueError, match=r"'seq-mean-token-sum' needs \(B, T\)"):
        clipped_policy_loss(flat, flat, flat, aggregation="seq-mean-token-sum")
    with pytest.raises(ValueError, match="ratio_level must be one of token, sequence; got 'row'"):
        clipped_policy_loss(x, x, x, ratio_level="row")
    with pytest.raises(ValueError, match="aggregation must be one of"):
        clipped_policy_loss(x, x, x, aggregation="sum")
    with pytest.raises(ValueError, match="num_items must be a finite number >= 0; got -1"):
        clipped_policy_loss(x, x, x, num_items=-1)
    for number in (1.0, 0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="dual_clip must be a finite number > 1"):
            clipped_policy_loss(x, x, x, dual_clip=number)
    with pytest.raises(ValueError, match=r"clip_low must be in \[0, 1\]; got -0.1"):
        clipped_policy_loss(x, x, x, clip_low=-0.1)
    with pytest.raises(ValueError, match=r"clip_low must be in \[0, 1\].*got 1.5"):
        clipped_policy_loss(x, x, x, clip_low=1.5)
    for number in (math.nan, None):
        with pytest.raises(ValueError, match=f"clip_high must be a finite number >= 0; got {number}"):
            clipped_policy_loss(x, x, x, clip_high=number)
    clipped_policy_loss(x, x, x, clip_low=0, clip_high=0)  # the ends themselves are allowed
    clipped_policy_loss(x, x, x, clip_low=1)
    with pytest.raises(ValueError, match=r"advantages must have shape \(2, 3\).*got \(2,\)"):
        clipped_policy_loss(x, x, x[:, 0])
    with pytest.raises(ValueError, match="mask must have shape"):
        clipped_policy_loss(x, x, x, x[0])
    with pytest.raises(TypeError, match="old_logprobs must be float64"):
        clipped_policy_loss(x, x.long(), x)
    with pytest.raises(ValueError, match="one device"):
        clipped_policy_loss(x, x, x.to("meta"))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_variance_of_close_ratios_keeps_its_digits(level: str) -> None:
    """Their squares differ in the last digits of a float32 alone."""
    noise = 1e-3 * torch.randn(3, 700, generator=seeded(11))
    noise[:, ::2] *= 0.01
    mask = torch.ones(3, 700)
    mask[1, 300:400] = 0  # the first tokens of a block
    old_logprobs = torch.zeros(3, 700)
    logprobs = 0.5 + noise + 1e-3 * torch.arange(3)[:, None]
    got, true = (
        clipped_policy_loss(logprobs.to(dtype), old_logprobs, old_logprobs, mask, ratio_level=level).ratio_var
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(got.double(), true, rtol=1e-3, atol=0)
