import math
from typing import Any

import pytest
import torch
from devices import seeded
from torch import Tensor

from rlhf_fast.ops import PPOLoss, aggregate, clipped_policy_loss, clipped_value_loss, ppo_loss, token_kl
from rlhf_fast.ops._aggregate import AGGREGATIONS

pytestmark = pytest.mark.usefixtures("backend")

NAMES = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "ref_logprobs")
TRAINED = ("logprobs", "values", "entropy")
WEIGHTS = {"value_coef": 0.5, "entropy_coef": 0.2, "kl_coef": 0.3}


def sample(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and a mask; about a third of the ratios and many of the values outside the default clip ranges."""
    generator = torch.Generator().manual_seed(seed)
    x = dict(zip(NAMES, torch.randn(len(NAMES), *shape, generator=generator, dtype=dtype).unbind(), strict=True))
    x["logprobs"] = x["old_logprobs"] + 0.2 * x["logprobs"]
    x["values"] = x["old_values"] + 0.5 * x["values"]
    x["entropy"] = x["entropy"].abs()
    return x, torch.rand(shape, generator=generator) < 0.7


def grads(loss: Tensor, x: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x[name] for name in TRAINED], materialize_grads=True))


def grown(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_(name in TRAINED) for name, tensor in x.items()}


def test_by_hand() -> None:
    # A, r:             1, 1.5    -1, 1.5
    # -A r:            -1.5        1.5
    # policy:          -1.2*       1.5        * the clipped branch: gradient 0
    # v, old, R:        1.5, 1, 2  0.5, 1, 2
    # value:            0.32*      1.125      half of 0.8^2 and of 1.5^2
    # entropy:          0.7        0.9
    # d to reference:   0.5       -0.5
    # k2, its slope:    0.125, 0.5   0.125, -0.5
    old_logprobs = torch.tensor([-1.0, -2.0])
    logprobs = (old_logprobs + math.log(1.5)).requires_grad_()
    values = torch.tensor([1.5, 0.5], requires_grad=True)
    entropy = torch.tensor([0.7, 0.9], requires_grad=True)
    result = ppo_loss(
        logprobs, old_logprobs, torch.tensor([1.0, -1.0]), values, torch.ones(2), torch.full((2,), 2.0),
        entropy=entropy, ref_logprobs=logprobs.detach() - torch.tensor([0.5, -0.5]), kl_estimator="k2", value_coef=0.5,
        kl_coef=4.0, entropy_coef=0.1,
    )  # fmt: skip
    result.loss.backward()
    assert result.policy_loss.item() == pytest.approx(0.3 / 2, rel=1e-5)
    assert result.value_loss.item() == pytest.approx(1.445 / 2, rel=1e-5)
    assert result.kl.item() == pytest.approx(0.125, rel=1e-5)
    assert result.entropy.item() == pytest.approx(0.8, rel=1e-5)
    assert result.loss.item() == pytest.approx(0.15 + 0.5 * 0.7225 + 4 * 0.125 - 0.1 * 0.8, rel=1e-5)
    torch.testing.assert_close(logprobs.grad, torch.tensor([0 + 4 * 0.5, 1.5 - 4 * 0.5]) / 2)
    torch.testing.assert_close(values.grad, 0.5 * torch.tensor([0.0, -1.5]) / 2)
    torch.testing.assert_close(entropy.grad, torch.tensor([-0.05, -0.05]))
    assert result.clip_fraction.item() == 0.5 and result.value_clip_fraction.item() == 0.5
    assert result.approx_kl.item() == pytest.approx(0.5 * math.log(1.5) ** 2, rel=1e-5)
    assert result.ratio_mean.item() == pytest.approx(1.5) and result.ratio_max.item() == pytest.approx(1.5)
    assert result.ratio_var.item() == pytest.approx(0, abs=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "all terms": WEIGHTS,
    "defaults": {},
    "no value term": WEIGHTS | {"value_coef": 0.0},
    "no entropy term": WEIGHTS | {"entropy_coef": 0.0},
    "no KL term": WEIGHTS | {"kl_coef": 0.0},
    "straight-through KL": WEIGHTS | {"kl_estimator": "k1+"},
    "other bounds": WEIGHTS | {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.2, "value_clip": None},
}


def check_against_the_parts(x: dict[str, Tensor], mask: Tensor | None, options: dict[str, Any]) -> None:
    """The same numbers and gradients as the separate ops."""
    x = grown(x)
    result = ppo_loss(**x, mask=mask, **options)

    live = torch.ones_like(x["logprobs"], dtype=torch.bool) if mask is None else mask
    shared = {name: options[name] for name in ("aggregation", "num_items") if name in options}
    clips = {name: options[name] for name in ("clip_low", "clip_high", "dual_clip") if name in options}
    policy = clipped_policy_loss(x["logprobs"], x["old_logprobs"], x["advantages"], mask, **clips, **shared)
    value = clipped_value_loss(
        x["values"], x["old_values"], x["returns"], mask, clip=options.get("value_clip", 0.2), **shared
    )
    shared.setdefault("aggregation", "token-mean")
    estimates = token_kl(x["logprobs"], x["ref_logprobs"], mask, estimator=options.get("kl_estimator", "k3"))
    kl, entropy = aggregate(estimates, live, **shared), aggregate(x["entropy"], live, **shared)
    loss = policy.loss + options.get("value_coef", 0.1) * value.loss
    loss = loss + options.get("kl_coef", 0.0) * kl - options.get("entropy_coef", 0.0) * entropy

    expected = PPOLoss(loss, policy.loss, value.loss, kl, entropy, *policy[1:], value.clip_fraction)
    for name, ours, theirs in zip(PPOLoss._fields, result, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=3e-6, atol=3e-6, msg=lambda m, n=name: n + m)
    torch.testing.assert_close(grads(result.loss, x), grads(loss, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("label", OPTIONS)
def test_the_sum_of_the_parts(label: str, masked: bool) -> None:
    x, mask = sample(0, 3, 5)
    check_against_the_parts(x, mask if masked else None, OPTIONS[label])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("num_items", [None, 5, 0, torch.tensor(2.5)], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(aggregation: str, num_items: float | Tensor | None, masked: bool) -> None:
    x, mask = sample(1, 4, 5)
    mask[1] = False  # a sequence that does not count
    options = WEIGHTS | {"aggregation": aggregation, "num_items": num_items}
    check_against_the_parts(x, mask if masked else None, options)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_micro_batches_by_hand(rows: int) -> None:
    """8 live tokens in 4 ragged rows. Inside both clips a token's slopes are -A r / 8 and 0.1 (v - R) / 8, however
    many rows a call takes: num_items, the tokens of them all, is each call's divisor.
    """
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]])
    old, advantages, old_values, returns = torch.randn(4, 4, 3, generator=seeded(0)).unbind()
    logprobs, values = (old + 0.1).requires_grad_(), (old_values + 0.05).requires_grad_()
    data = (logprobs, old, advantages, values, old_values, returns, mask)
    for part in zip(*(tensor.split(rows) for tensor in data), strict=True):
        ppo_loss(*part, num_items=mask.sum()).loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages * math.exp(0.1) / 8 * mask, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(values.grad, 0.1 * (old_values + 0.05 - returns) / 8 * mask, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_many_tiles(aggregation: str) -> None:
    """Several programs and blocks, with bounds of sequences anywhere in them; every run gives the same bits."""
    x, mask = sample(2, 21, 331)
    options = WEIGHTS | {"aggregation": aggregation}
    check_against_the_parts(x, mask, options)
    first, second = (ppo_loss(**x, mask=mask, **options) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck(aggregation: str) -> None:
    x, mask = sample(3, 4, 6, dtype=torch.float64)
    x = grown(x)
    result = ppo_loss(**x, mask=mask, **WEIGHTS)
    assert 0 < result.clip_fraction < 1 and 0 < result.value_clip_fraction < 1  # all branches are checked
    leaves = [x[name] for name in TRAINED]

    def call(*inputs: Tensor) -> Tensor:
        given = x | dict(zip(TRAINED, inputs, strict=True))
        return ppo_loss(**given, mask=mask, aggregation=aggregation, **WEIGHTS).loss

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("name, weight", [("values", "value_coef"), ("entropy", "entropy_coef")])
def test_a_term_of_weight_0_stays_out_of_the_loss(name: str, weight: str) -> None:
    x, mask = sample(4, 3, 5)
    x[name][:] = torch.nan
    x = grown(x)
    result = ppo_loss(**x, mask=mask, **WEIGHTS | {weight: 0.0})
    assert result.loss.isfinite() and getattr(result, {"values": "value_loss"}.get(name, name)).isnan()
    result.loss.backward()
    assert [x[trained].grad is None for trained in TRAINED] == [trained == name for trained in TRAINED]


def test_a_kl_term_of_weight_0_stays_out_of_the_loss() -> None:
    x, mask = sample(4, 3, 5)
    x["ref_logprobs"][:] = torch.nan
    x = grown(x)
    result = ppo_loss(**x, mask=mask, **WEIGHTS | {"kl_coef": 0.0})
    assert result.loss.isfinite() and result.kl.isnan()
    assert all(grad.isfinite().all() for grad in grads(result.loss, x))


def test_without_old_logprobs_they_are_the_policys_own() -> None:
    x, mask = sample(5, 3, 5)
    x = grown(x)
    given, own = (ppo_loss(**x | {"old_logprobs": old}, mask=mask, **WEIGHTS) for old in (x["logprobs"].detach(), None))
    assert all(torch.equal(a, b) for a, b in zip(given, own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads(given.loss, x), grads(own.loss, x), strict=True))


def test_without_entropy_and_reference() -> None:
    x, mask = sample(5, 3, 5)
    with_both = ppo_loss(**x, mask=mask)
    del x["entropy"], x["ref_logprobs"]
    result = ppo_loss(**x, mask=mask)
    assert result.entropy == 0 and result.kl == 0 and with_both.entropy > 0 and with_both.kl > 0
    for ours, theirs in zip(result, with_both._replace(entropy=result.entropy, kl=result.kl), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("trained", [("logprobs",), ("values",), ("entropy",), ("values", "entropy")], ids=str)
def test_only_what_asks_for_a_gradient_gets_one(trained: tuple[str, ...]) -> None:
    x, mask = sample(6, 3, 5)
    x = {name: tensor.requires_grad_(name in trained) for name, tensor in x.items()}
    everything = grown(x)
    expected = dict(zip(TRAINED, grads(ppo_loss(**everything, mask=mask, **WEIGHTS).loss, everything), strict=True))
    ppo_loss(**x, mask=mask, **WEIGHTS).loss.backward()
    for name in NAMES:
        assert torch.equal(x[name].grad, expected[name]) if name in trained else x[name].grad is None


def test_only_the_loss_has_a_gradient() -> None:
    x = {name: torch.rand(2, 3, requires_grad=True) for name in NAMES}
    result = ppo_loss(**x, **WEIGHTS)
    assert [number.requires_grad for number in result] == [True] + [False] * 10
    result.loss.backward()
    assert [name for name in NAMES if x[name].grad is not None] == sorted(TRAINED, key=NAMES.index)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 3)], ids=str)
def test_empty_and_all_masked(aggregation: str, shape: tuple[int, int]) -> None:
    x = grown({name: torch.full(shape, torch.nan) for name in NAMES})
    result = ppo_loss(**x, mask=torch.zeros(shape), aggregation=aggregation, **WEIGHTS)
    assert [number.item() for number in result] == [0.0] * 11
    assert all(torch.equal(grad, torch.zeros(shape)) for grad in grads(result.loss, x))


def test_any_shape_dtype_and_strides() -> None:
    x, mask = sample(7, 4, 6)
    half = {name: tensor.bfloat16() for name, tensor in x.items()}
    expected = ppo_loss(**{name: tensor.float() for name, tensor in half.items()}, mask=mask, **WEIGHTS)
    for lay in (torch.Tensor.flatten, lambda tensor: tensor.T.contiguous().T, lambda tensor: tensor.view(2, 2, 6)):
        got = ppo_loss(**{name: lay(tensor) for name, tensor in half.items()}, mask=lay(mask), **WEIGHTS)
        assert all(number.dtype == torch.float32 for number in got)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert ppo_loss(**x | {"returns": x["returns"].double()}, mask=mask).loss.dtype == torch.float64


def test_bad_arguments() -> None:
    z = torch.zeros(2, 3)
    x = (z, z, z, z, z, z)
    with pytest.raises(ValueError, match="kl_coef=0.1 needs ref_logprobs, which is None"):
        ppo_loss(*x, kl_coef=0.1)
    with pytest.raises(ValueError, match="entropy_coef=0.1 needs entropy, which is None"):
        ppo_loss(*x, entropy_coef=0.1)
    with pytest.raises(ValueError, match="kl_estimator must be one of k1, .*; got 'k4'"):
        ppo_loss(*x, kl_estimator="k4")
    for name in ("value_coef", "kl_coef", "entropy_coef", "clip_high"):
        for number in (-0.1, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"ppo_loss: {name} must be a finite number >= 0"):
                ppo_loss(*x, entropy=z, ref_logprobs=z, **{name: number})
        with pytest.raises(TypeError, match=f"ppo_loss: {name} must be a number; got a tensor"):
            ppo_loss(*x, entropy=z, ref_logprobs=z, **{name: torch.tensor(0.5)})
    with pytest.raises(ValueError, match="value_clip must be a finite number > 0, or None; got 0"):
        ppo_loss(*x, value_clip=0)
    with pytest.raises(ValueError, match="dual_clip must be a finite number > 1"):
        ppo_loss(*x, dual_clip=1.0)
    with pytest.raises(ValueError, match=r"clip_low must be in \[0, 1\]"):
        ppo_loss(*x, clip_low=1.5)
    with pytest.raises(ValueError, match="aggregation must be one of"):
        ppo_loss(*x, aggregation="sum")
    with pytest.raises(ValueError, match=r"'seq-mean-token-sum' needs \(B, T\)"):
        ppo_loss(*[z[0]] * 6, aggregation="seq-mean-token-sum")
    with pytest.raises(ValueError, match="num_items must be a finite number >= 0; got -1"):
        ppo_loss(*x, num_items=-1)


@pytest.mark.parametrize("trained", [TRAINED, ("logprobs",)], ids=["all", "one"])
def test_a_gradient_that_is_changed_leaves_the_kept_graph_alone(trained: tuple[str, ...]) -> None:
    """The graph keeps the gradients; the leaves get copies, so that clipping or zeroing them is safe."""
    x, mask = sample(3, 2, 4)
    leaves = {name: tensor.clone().requires_grad_(name in trained) for name, tensor in x.items()}
    loss = ppo_loss(**leaves, mask=mask, **WEIGHTS).loss
    loss.backward(retain_graph=True)
    first = {name: leaves[name].grad.clone() for name in trained}
    for name in trained:
        leaves[name].grad.zero_()
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    for name in trained:
        torch.testing.assert_close(leaves[name].grad, 3 * first[name])
        assert first[name].any()


@pytest.mark.parametrize("trained", [TRAINED, ("logprobs",)], ids=["all", "one"])
def test_several_backwards_of_one_graph(trained: tuple[str, ...]) -> None:
    """Each gets its own upstream gradient, whatever those before were; the last one does not keep the graph.

    0 times an upstream gradient that is not finite is left open: masked and clipped tokens.
    """
    x, mask = sample(8, 5, 300)
    leaves = [x[name].requires_grad_() for name in trained]
    loss = ppo_loss(**x, mask=mask, **WEIGHTS).loss
    expected = torch.autograd.grad(ppo_loss(**x, mask=mask, **WEIGHTS).loss, leaves)
    for upstream in (1.0, 0.0, -2.5, math.nan, math.inf, 1.0, 3.0):
        got = torch.autograd.grad(loss, leaves, torch.tensor(upstream), retain_graph=upstream != 3)
        for ours, once in zip(got, expected, strict=True):
            if math.isfinite(upstream):
                torch.testing.assert_close(ours, upstream * once, rtol=1e-5, atol=1e-8)
            else:
                assert not ours[once != 0].isfinite().any()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)
