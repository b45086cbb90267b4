"""linear_policy_loss: a case worked by hand, and equality with its parts."""

import math
from typing import Any

import pytest
import torch
from devices import seeded
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rlhf_fast.ops import (
    _sweep,
    aggregate,
    clipped_policy_loss,
    exact_kl,
    linear_logprobs,
    linear_policy_loss,
    masked_logprobs,
)

pytestmark = pytest.mark.usefixtures("backend")

# logits (0, log 3): p = (1/4, 3/4)
WEIGHT = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
ENTROPY = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand() -> None:
    """Two live tokens of three, both sampled at probability 1/2.

    Target 1: ratio 3/2, advantage 2, clipped at 1.2: loss -2.4. Target 0: ratio 1/2, advantage 3, unclipped: -1.5.
    KL by k1 to a reference at probability 1/4: log 3 and 0.
    """
    hidden = torch.ones(1, 3, 1, dtype=torch.float64, requires_grad=True)
    half, quarter = math.log(1 / 2), math.log(1 / 4)
    result = linear_policy_loss(
        hidden,
        WEIGHT,
        torch.tensor([[1, 0, -100]]),
        tensor([[half, half, math.nan]]),
        tensor([[2.0, 3.0, math.nan]]),
        ref_logprobs=tensor([[quarter, quarter, math.nan]]),
        kl_coef=0.5,
        kl_estimator="k1",
        entropy_coef=0.1,
    )
    assert result.policy_loss.item() == pytest.approx((-2.4 - 1.5) / 2)
    assert result.kl.item() == pytest.approx(math.log(3) / 2)
    assert result.entropy.item() == pytest.approx(ENTROPY)
    assert result.loss.item() == pytest.approx((-2.4 - 1.5) / 2 + 0.5 * math.log(3) / 2 - 0.1 * ENTROPY)
    assert result.clip_fraction.item() == 0.5
    assert result.approx_kl.item() == pytest.approx((math.log(3 / 2) ** 2 + math.log(1 / 2) ** 2) / 4)
    assert result.ratio_mean.item() == pytest.approx(1.0)
    assert result.ratio_max.item() == pytest.approx(1.5)
    assert result.ratio_var.item() == pytest.approx(0.25)
    assert [output.requires_grad for output in result] == [True] + [False] * 8

    result.loss.backward()
    # d logp / d hidden is log 3 * (1/4) for target 1 and -log 3 * (3/4) for target 0, d entropy / d hidden is
    # log 3 * (-3/4) (log(3/4) + entropy); the policy term moves target 0 alone, by -advantage * ratio.
    log3 = math.log(3)
    entropy = 0.1 * log3 * 0.75 * (math.log(3 / 4) + ENTROPY)
    first = (0.5 * log3 / 4 + entropy) / 2
    second = (-1.5 * -log3 * 0.75 + 0.5 * -log3 * 0.75 + entropy) / 2
    torch.testing.assert_close(hidden.grad, tensor([[[first], [second], [0.0]]]))


def test_without_a_reference_there_is_no_kl() -> None:
    result = linear_policy_loss(tensor([[1.0]]), WEIGHT, torch.tensor([0]), tensor([-1.0]), tensor([1.0]))
    assert result.kl.item() == 0.0
    assert result.loss == result.policy_loss


def test_kl_without_a_weight_is_measured_and_left_out() -> None:
    arguments = (tensor([[1.0]]), WEIGHT, torch.tensor([0]), tensor([-1.0]), tensor([1.0]))
    result = linear_policy_loss(*arguments, ref_logprobs=tensor([-2.0]), kl_estimator="k1")
    assert result.kl.item() == pytest.approx(2 - math.log(4))
    assert result.loss == result.policy_loss


@pytest.mark.parametrize(
    ("aggregation", "divisors"),
    [("token-mean", [3, 3]), ("seq-mean-token-sum", [2, 2]), ("seq-mean-token-mean", [4, 2]),
     ("seq-mean-token-sum-norm", [4, 4])],
)  # fmt: skip
def test_every_term_is_aggregated_alike(aggregation: str, divisors: list[int]) -> None:
    """Sequences of 2 and 1 live tokens, T = 2. Ratios are 1, so that a token's policy loss is -advantage."""
    quarter = math.log(1 / 4)
    result = linear_policy_loss(
        torch.ones(2, 2, 1, dtype=torch.float64),
        WEIGHT,
        torch.zeros(2, 2, dtype=torch.int64),
        tensor([[quarter, quarter], [quarter, 0.0]]),
        tensor([[5.0, 2.0], [1.0, 9.0]]),
        torch.tensor([[1, 1], [1, 0]]),
        ref_logprobs=tensor([[quarter - 3, quarter], [quarter - 1, 9.0]]),
        kl_estimator="k1",
        aggregation=aggregation,
    )
    first, second = divisors
    assert result.policy_loss.item() == pytest.approx(-7 / first - 1 / second)
    assert result.kl.item() == pytest.approx(3 / first + 1 / second)
    assert result.entropy.item() == pytest.approx(2 * ENTROPY / first + ENTROPY / second)


def test_options_reach_the_loss() -> None:
    """Ratio 3 * 1/4 = 3/4 at advantage -1 with clip_low 0.1: 0.9; num_items 4 divides it. Dual clip at ratio 4."""
    one = (tensor([[1.0]]), WEIGHT, torch.tensor([0]))
    result = linear_policy_loss(*one, tensor([math.log(1 / 3)]), tensor([-1.0]), clip_low=0.1, num_items=4)
    assert result.loss.item() == pytest.approx(0.9 / 4)
    result = linear_policy_loss(*one, tensor([math.log(1 / 16)]), tensor([-1.0]), dual_clip=3.0)
    assert result.loss.item() == pytest.approx(3.0)
    result = linear_policy_loss(*one, tensor([math.log(1 / 6)]), tensor([1.0]), clip_high=0.4)
    assert result.loss.item() == pytest.approx(-1.4)


def test_a_sequence_ratio() -> None:
    """Ratios 3/2 and 1/2 a token: sqrt(3/4) for the sequence, within the clip."""
    half = math.log(1 / 2)
    result = linear_policy_loss(
        torch.ones(1, 2, 1, dtype=torch.float64), WEIGHT, torch.tensor([[1, 0]]), tensor([[half, half]]),
        tensor([[1.0, 1.0]]), ratio_level="sequence", aggregation="seq-mean-token-mean",
    )  # fmt: skip
    assert result.loss.item() == pytest.approx(-math.sqrt(3 / 4))


def test_a_frozen_head_and_terms_of_weight_zero_cost_nothing() -> None:
    hidden, targets = torch.ones(6, 1, dtype=torch.float64, requires_grad=True), torch.zeros(6, dtype=torch.int64)
    mask = torch.tensor([1, 1, 0, 0, 0, 1])
    with FlopCounterMode(display=False) as counter:
        linear_policy_loss(hidden, WEIGHT, targets, tensor([-1.0] * 6), tensor([1.0] * 6), mask).loss.backward()
    assert counter.get_total_flops() == 3 * (2 * 3 * 1 * 2)  # logits, again in the backward, d hidden; 3 live tokens


# ---- the exact KL ---------------------------------------------------------------------------------------------------


def test_an_exact_kl_by_hand() -> None:
    """p = (1/4, 3/4), and r = (1/2, 1/2): the KL is 1/4 log(1/2) + 3/4 log(3/2). Advantage 0 and one masked token."""
    hidden = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    ref_hidden = tensor([[0.0], [math.nan]]).requires_grad_()
    result = linear_policy_loss(
        hidden, WEIGHT, torch.tensor([0, -100]), tensor([-1.0, 0.0]), tensor([0.0, 0.0]), ref_hidden=ref_hidden,
        kl_coef=0.5, kl_estimator="exact",
    )  # fmt: skip
    kl = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert result.kl.item() == pytest.approx(kl)
    assert result.loss.item() == pytest.approx(0.5 * kl)
    assert [output.requires_grad for output in result] == [True] + [False] * 8
    result.loss.backward()
    # d KL / d x_j = p_j (log p_j - log r_j - KL), and logit 1 alone moves, by log 3
    slope = 0.5 * math.log(3) * 0.75 * (math.log(3 / 2) - kl)
    torch.testing.assert_close(hidden.grad, tensor([[slope], [0.0]]))
    assert ref_hidden.grad is None


def random_pair(dtype: torch.dtype, vocab: int = 9) -> tuple[Tensor, ...]:
    """hidden, ref_hidden (2, 4, 3), weight (vocab, 3), targets, old_logprobs, advantages, mask (2, 4)"""
    generator = seeded(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, ref_hidden = normal(2, 4, 3), normal(2, 4, 3)
    targets = torch.randint(7, (2, 4), generator=generator)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    return hidden, ref_hidden, normal(vocab, 3), targets, normal(2, 4) - 2, normal(2, 4), mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("options", [
    {"aggregation": "token-mean"},
    {"aggregation": "seq-mean-token-mean", "num_items": 3.0},
    {"aggregation": "seq-mean-token-sum-norm"},
], ids=lambda options: options["aggregation"])  # fmt: skip
def test_an_exact_kl_is_its_parts(options: dict[str, Any], ratio_level: str, dtype: torch.dtype) -> None:
    """The loss and the gradients of clipped_policy_loss + kl_coef * exact_kl - entropy_coef * entropy over logits."""
    hidden, ref_hidden, weight, targets, old_logprobs, advantages, mask = random_pair(dtype)
    bias, down, up = (torch.linspace(-1, 1, size).to(dtype) for size in (9, 3, 9))
    trained = [each.requires_grad_() for each in (hidden, weight, bias, down, up)]
    temperature = torch.tensor([0.7, 1.3])[:, None].expand(2, 4)
    shared = {"ratio_level": ratio_level, "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0, **options}
    result = linear_policy_loss(
        hidden, weight, targets, old_logprobs, advantages, mask, ref_hidden=ref_hidden, kl_coef=0.3,
        kl_estimator="exact", entropy_coef=0.1, bias=bias, lora=(down[None], up[:, None], 0.5), softcap=4.0,
        vocab_size=7, temperature=temperature, **shared,
    )  # fmt: skip
    grads = torch.autograd.grad(result.loss, trained)

    def capped(logits: Tensor) -> Tensor:
        return 4 * torch.tanh((logits + bias)[..., :7] / 4)

    logits = capped(hidden @ weight.T + 0.5 * (hidden @ down)[..., None] * up)
    with torch.no_grad():
        ref_logits = capped(ref_hidden @ weight.T)
    logprobs, entropy = masked_logprobs(logits, targets, mask, temperature=temperature, return_entropy=True)
    policy = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, **shared)
    kl = exact_kl(logits, ref_logits, mask, temperature=temperature)
    kl, entropy = (aggregate(each, mask.bool(), **options) for each in (kl, entropy))
    loss = policy.loss + 0.3 * kl - 0.1 * entropy
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(grads, torch.autograd.grad(loss, trained), **close)
    parts = (loss, policy.loss, kl, entropy, *policy[1:])
    torch.testing.assert_close(tuple(each.detach() for each in result), tuple(each.detach() for each in parts), **close)


def test_the_same_states_give_no_exact_kl() -> None:
    """The KL is 0, and the gradient that of the loss without it."""
    hidden, _, weight, targets, *tokens = random_pair(torch.float32, 5000)
    hidden.requires_grad_()
    with_kl, without = (
        linear_policy_loss(hidden, weight, targets, *tokens, **options)
        for options in ({"ref_hidden": hidden, "kl_coef": 10.0, "kl_estimator": "exact"}, {})
    )
    assert with_kl.kl.item() == 0.0
    assert torch.equal(with_kl.loss, without.loss)
    grads = [torch.autograd.grad(result.loss, hidden)[0] for result in (with_kl, without)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_an_exact_kl_without_a_weight_is_measured_and_left_out() -> None:
    """So is one that is infinite: column 0 has a probability in the policy and none in the reference."""
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[2.0], [0.0]])
    arguments = (weight, torch.tensor([1]), torch.tensor([-1.0]), torch.tensor([1.0]))
    plain = linear_policy_loss(hidden, *arguments)
    result = linear_policy_loss(hidden, *arguments, ref_hidden=torch.tensor([[-3e38]]), kl_estimator="exact")
    assert result.kl.item() == math.inf
    assert plain.loss.isfinite() and torch.equal(result.loss, plain.loss)
    grads = [torch.autograd.grad(each.loss, hidden)[0] for each in (result, plain)]
    torch.testing.assert_close(*grads)


def test_one_column_has_no_exact_kl() -> None:
    hidden = torch.ones(1, 1, requires_grad=True)
    one = torch.ones(1)
    result = linear_policy_loss(
        hidden, torch.ones(1, 1), torch.tensor([0]), 0 * one, one, ref_hidden=-hidden, kl_coef=1.0,
        kl_estimator="exact",
    )  # fmt: skip
    result.loss.backward()
    assert result.kl.item() == 0.0 and result.loss.item() == -1.0
    assert hidden.grad is not None and hidden.grad.item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": "exact"}, "kl_estimator 'exact' needs ref_hidden .* got 'exact' with no reference"),
        ({"ref_hidden": tensor([[1.0]])}, "kl_estimator .* no other takes ref_hidden; got 'k3' with ref_hidden"),
        (
            {"kl_estimator": "exact", "ref_hidden": tensor([[1.0]]), "ref_logprobs": tensor([1.0])},
            "kl_estimator .* no ref_logprobs, .* got 'exact' with ref_hidden and ref_logprobs",
        ),
        ({"kl_estimator": "exact", "ref_hidden": tensor([1.0])}, r"ref_hidden must have shape \(1, 1\)"),
        ({"kl_coef": 0.1}, "kl_coef=0.1 needs ref_logprobs"),
        ({"kl_coef": -0.1}, "kl_coef must be a finite number >= 0; got -0.1"),
        ({"entropy_coef": math.nan}, "entropy_coef must be a finite number >= 0; got nan"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of .* got 'k4'"),
        ({"aggregation": "seq-mean-token-sum"}, r"aggregation .* needs \(B, T\)"),
        ({"aggregation": "mean"}, "aggregation must be one of .* got 'mean'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_policy_loss: {message}"):
        linear_policy_loss(tensor([[1.0]]), WEIGHT, torch.tensor([0]), tensor([-1.0]), tensor([1.0]), **options)


# ---- without old log-probs: the policy's own ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"aggregation": "seq-mean-token-mean", "num_items": 3.0, "ratio_level": "token"},
    {"ratio_level": "sequence"},
], ids=lambda options: options["ratio_level"])  # fmt: skip
@pytest.mark.parametrize("reference", ["none", "k3", "exact"])
def test_without_old_logprobs_they_are_the_policys_own(reference: str, options: dict[str, Any]) -> None:
    """As with the log-probs of a first call, and the ratio is exactly 1."""
    hidden, ref_hidden, weight, targets, _, advantages, mask = random_pair(torch.float32)
    trained = [each.requires_grad_() for each in (hidden, weight)]
    logprobs = linear_logprobs(hidden, weight, targets, mask)
    options = {"entropy_coef": 0.1, **options}
    if reference == "k3":
        options |= {"kl_coef": 0.3, "ref_logprobs": logprobs.detach() - 0.5}
    if reference == "exact":
        options |= {"kl_coef": 0.3, "kl_estimator": "exact", "ref_hidden": ref_hidden}
    expected = linear_policy_loss(hidden, weight, targets, logprobs, advantages, mask, **options)
    result = linear_policy_loss(hidden, weight, targets, None, advantages, mask, **options)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(each.loss, trained) for each in (result, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    assert [number.item() for number in result[4:]] == [0.0, 0.0, 1.0, 1.0, pytest.approx(0.0, abs=1e-15)]
    with torch.no_grad():
        again = linear_policy_loss(hidden, weight, targets, None, advantages, mask, **options)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)


def test_without_old_logprobs_the_logits_are_computed_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass, which has all gradients on the engines; the reference computes them again, as always."""
    calls = []
    project = _sweep._project
    monkeypatch.setattr(_sweep, "_project", lambda *given: calls.append(given) or project(*given))
    hidden, _, weight, targets, _, advantages, _ = random_pair(torch.float32)
    linear_policy_loss(hidden.requires_grad_(), weight, targets, None, advantages).loss.backward()
    assert len(calls) == (backend != "torch")
