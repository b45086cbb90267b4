"""Our functions with verl's signatures against verl's own, on random and edge inputs, in float32 and float64.

verl's modules need ray to be importable, and call nothing of it here: it is stood in for.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from conftest import imported
from torch import Tensor

from rlhf_fast.integrations import verl as ours

core = imported("verl.trainer.ppo.core_algos")
functional = imported("verl.utils.torch_functional")
heads = imported("verl.utils.experimental.torch_functional")

seeds = pytest.mark.parametrize("seed", range(4))


def tokens(seed: int) -> SimpleNamespace:
    """(5, 7) in float64; ratios on both sides of every clip; the first rows have every token, the last has one."""
    generator = torch.Generator().manual_seed(seed)
    old, noise, advantages, other = torch.randn(4, 5, 7, generator=generator, dtype=torch.float64).unbind()
    mask = (torch.rand(5, 7, generator=generator) < 0.7).long()
    mask[0], mask[4, 1:], mask[4, 0] = 1, 0, 1
    mask[:4, 0] = 1
    weights = torch.rand(5, 7, generator=generator, dtype=torch.float64) * 2
    return SimpleNamespace(
        log_prob=(old + 0.8 * noise - 2).requires_grad_(), old=old - 2, advantages=advantages, other=other, mask=mask,
        weights=weights,
    )  # fmt: skip


def same(own: Tensor, theirs: Tensor, by: Tensor, rtol: float = 1e-6) -> None:
    """Values and gradients. verl adds 1e-8 to its divisors."""
    torch.testing.assert_close(own, theirs.to(own.dtype), rtol=rtol, atol=1e-9)
    grads = [torch.autograd.grad(each, by, retain_graph=True)[0] for each in (own.sum(), theirs.sum())]
    torch.testing.assert_close(*grads, rtol=rtol, atol=1e-9)


class Config(SimpleNamespace):
    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def config(**changes: Any) -> Config:
    """What the losses read of verl's ActorConfig."""
    made = {
        "clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "tau_pos": 1.0,
        "tau_neg": 1.05, "global_batch_info": {}, "policy_loss": Config(
            clip_cov_ratio=None, clip_cov_lb=None, clip_cov_ub=None, kl_cov_ratio=None, ppo_kl_coef=None,
            dro_beta=0.3,
        ),
    }  # fmt: skip
    return Config(**made | changes)


BATCHES = [
    {},
    {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 9},
    {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 9, "loss_scale_factor": 11},
    {"loss_scale_factor": 11},
]
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


@seeds
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_aggregation(seed: int, mode: str, batch: dict[str, Any]) -> None:
    x = tokens(seed)
    x.mask[3] = 0
    args = (x.log_prob, x.mask, mode)
    same(ours.agg_loss(*args, **batch), core.agg_loss(*args, **batch), x.log_prob)


def test_aggregation_refuses_what_verl_refuses() -> None:
    x = tokens(0)
    for mode in ("token-mean", "seq-mean-token-mean", "nothing"):
        for function in (ours.agg_loss, core.agg_loss):
            with pytest.raises(ValueError):
                function(x.log_prob, x.mask, mode, dp_size=2)


@seeds
@pytest.mark.parametrize("loss", ["vanilla", "gspo", "cispo", "sapo"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_losses(seed: int, loss: str, mode: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "ActorConfig", Config)
    x = tokens(seed)
    settings = config(global_batch_info=BATCHES[seed % 3])
    args = (x.old, x.log_prob, x.advantages, x.mask, mode, settings, x.weights if weighted else None)
    name = f"compute_policy_loss_{loss}"
    (own, metrics), (theirs, their_metrics) = (getattr(module, name)(*args) for module in (ours, core))
    same(own, theirs, x.log_prob)
    assert metrics == pytest.approx(their_metrics, rel=1e-6, abs=1e-7)
    assert metrics["actor/pg_clipfrac"] > 0 or loss == "sapo"


SELECTIONS = {
    # every token between the bounds, so that chance has no part
    "clip_cov": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 2.0},
    "kl_cov": {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7},
}


@seeds
@pytest.mark.parametrize("loss", ["dppo_tv", "dppo_kl", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_more_policy_losses(seed: int, loss: str, mode: str, weighted: bool) -> None:
    x = tokens(seed)
    x.old = x.old.clamp(max=-0.05)
    x.log_prob = x.log_prob.detach().clamp(max=-0.05).requires_grad_()
    settings = config(
        global_batch_info=BATCHES[seed % 3], clip_ratio_c=1.5, clip_ratio=0.05 if loss == "dppo_kl" else 0.2,
        policy_loss=Config(**vars(config().policy_loss) | SELECTIONS.get(loss, {})),
    )  # fmt: skip
    args = (x.old, x.log_prob, x.advantages, x.mask, mode, settings, x.weights if weighted else None)
    name = f"compute_policy_loss_{loss}"
    (own, metrics), (theirs, their_metrics) = (getattr(module, name)(*args) for module in (ours, core))
    same(own, theirs, x.log_prob)
    assert metrics == pytest.approx(their_metrics, rel=1e-6, abs=1e-7)
    assert all(value > 0 for name, value in metrics.items() if "clipfrac" in name)


@seeds
def test_dro_needs_its_beta(seed: int) -> None:
    x = tokens(seed)
    for beta in (None, 0.0):
        settings = config(policy_loss=Config(dro_beta=beta))
        for module in (ours, core):
            with pytest.raises(ValueError, match="dro_beta must be"):
                module.compute_policy_loss_dro(x.old, x.log_prob, x.advantages, x.mask, "token-mean", settings)


@seeds
def test_clip_cov_drops_as_many_tokens(seed: int) -> None:
    x = tokens(seed)
    settings = config(
        policy_loss=Config(**vars(config().policy_loss) | SELECTIONS["clip_cov"] | {"clip_cov_ratio": 0.1})
    )
    args = (x.old, x.log_prob, x.advantages, x.mask, "token-mean", settings)
    own, theirs = (module.compute_policy_loss_clip_cov(*args)[1] for module in (ours, core))
    assert own == pytest.approx(theirs, rel=1e-6) and own["actor/pg_clipfrac"] > 0


@seeds
def test_the_older_policy_loss(seed: int) -> None:
    x = tokens(seed)
    args = (x.old, x.log_prob, x.advantages, x.mask)
    own = ours.compute_policy_loss(*args, cliprange=0.2, cliprange_high=0.3, clip_ratio_c=1.5)
    theirs = core.compute_policy_loss(*args, cliprange=0.2, cliprange_high=0.3, clip_ratio_c=1.5)
    same(own[0], theirs[0], x.log_prob)
    for a, b in zip(own[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a.double(), b.detach().double(), rtol=1e-6, atol=1e-7)
    assert own[3] > 0


@seeds
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_value_loss(seed: int, batch: dict[str, Any]) -> None:
    x = tokens(seed)
    args = (x.log_prob, x.advantages, x.old, x.mask, 0.5, "seq-mean-token-sum-norm")
    (own, share), (theirs, their_share) = (module.compute_value_loss(*args, **batch) for module in (ours, core))
    same(own, theirs, x.log_prob)
    torch.testing.assert_close(share.double(), their_share.double(), rtol=1e-6, atol=1e-7)


@seeds
@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k2+", "k3+", "abs+"])
def test_kl(seed: int, name: str) -> None:
    x = tokens(seed)
    x.old[0, 0], x.old[0, 1], x.old[0, 2] = (
        40.0,
        -40.0,
        2.0,
    )  # past the bounds
    same(ours.kl_penalty(x.log_prob, x.old, name), core.kl_penalty(x.log_prob, x.old, name), x.log_prob)


@seeds
def test_gae_and_whitening(seed: int) -> None:
    """At masked tokens verl's have numbers and ours 0. verl divides by count + 1e-8, before and inside a variance."""
    x = tokens(seed)
    args = (x.advantages, x.other, x.mask, 0.97, 0.9)
    for own, theirs in zip(
        ours.compute_gae_advantage_return(*args), core.compute_gae_advantage_return(*args), strict=True
    ):
        torch.testing.assert_close(own, theirs * x.mask, rtol=1e-4, atol=1e-6)
    for shift_mean in (True, False):
        own = ours.masked_whiten(x.advantages, x.mask, shift_mean)
        theirs = functional.masked_whiten(x.advantages, x.mask, shift_mean)
        torch.testing.assert_close(own, theirs * x.mask, rtol=1e-4, atol=1e-6)


@seeds
def test_outcome_advantages(seed: int) -> None:
    """Prompts by name, in any order; one response stands alone, and one prompt's rewards are equal."""
    x = tokens(seed)
    index = numpy.array(["a", "b", "a", "c", "a"], dtype=object)
    for norm in (True, False):
        args = (x.advantages, x.mask.double(), index, 1e-6, norm)
        own = ours.compute_grpo_outcome_advantage(*args)[0]
        torch.testing.assert_close(own, core.compute_grpo_outcome_advantage(*args)[0], rtol=1e-6, atol=1e-9)
    args = (x.advantages, x.mask.double(), index)
    own = ours.compute_rloo_outcome_advantage(*args)[0]
    torch.testing.assert_close(own, core.compute_rloo_outcome_advantage(*args)[0], rtol=1e-6, atol=1e-9)
    equal = ours.compute_grpo_outcome_advantage(torch.ones(2, 3), torch.ones(2, 3), ["a", "a"])[0]
    assert torch.equal(equal, torch.zeros(2, 3))


@seeds
def test_from_logits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(3, 6, 40, generator=generator)).requires_grad_()
    labels = torch.randint(40, (3, 6), generator=generator)
    own = ours.logprobs_from_logits(logits, labels, inplace_backward=False)
    same(own, functional.logprobs_from_logits_naive(logits, labels), logits, rtol=1e-4)
    squares = functional.calculate_sum_pi_squared_from_logits(logits.double())
    torch.testing.assert_close(
        ours.calculate_sum_pi_squared_from_logits(logits).double(), squares, rtol=1e-5, atol=1e-7
    )
    exact = functional.entropy_from_logits(logits.double())
    for entropy in (ours.entropy_from_logits(logits), ours.entropy_from_logits_with_chunking(logits)):
        torch.testing.assert_close(entropy.double(), exact, rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(entropy.sum(), logits, retain_graph=True)
        (true,) = torch.autograd.grad(exact.sum(), logits, retain_graph=True)
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-5)


@seeds
def test_fused_heads(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(30, 8, generator=generator, requires_grad=True)
    labels = torch.randint(30, (2, 5), generator=generator)
    own = ours.FusedLinearForPPO()(hidden, weight, labels, 0.7)
    theirs = heads.FusedLinearForPPO()(hidden, weight, labels, 0.7)
    flat = ours.linear_cross_entropy(hidden, weight, labels, 0.7)
    for a, b, c in zip(own, theirs, flat, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert torch.equal(a.flatten(), c)
    grads = [torch.autograd.grad(x.sum() + 0.1 * y.sum(), (hidden, weight)) for x, y in (own, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected reduction 'none'"):
        ours.linear_cross_entropy(hidden, weight, labels, 0.7, "sum")


def test_the_patch() -> None:
    """verl's names lead to ours, its registries too, but for what a user registered; all is undone in the end."""
    before = {name: getattr(core, name) for name in ("agg_loss", "get_policy_loss_fn", "compute_value_loss")}
    importer = ModuleType("importer")
    importer.agg = core.agg_loss  # type: ignore[attr-defined]
    sys.modules["importer"] = importer
    x = tokens(0)
    core.POLICY_LOSS_REGISTRY["sapo"], verls = (own_sapo := lambda: None), core.POLICY_LOSS_REGISTRY["sapo"]
    try:
        with ours.patched() as report:
            assert importer.agg is core.agg_loss is not before["agg_loss"]  # type: ignore[attr-defined]
            core.agg_loss(x.log_prob, x.mask, "token-mean")
            assert core.get_policy_loss_fn("vanilla") is ours.compute_policy_loss_vanilla
            assert core.get_policy_loss_fn("sapo") is own_sapo
            assert core.get_policy_loss_fn("geo_mean") is ours.compute_policy_loss_geo_mean
            assert core.get_adv_estimator_fn(core.AdvantageEstimator.RLOO) is ours.compute_rloo_outcome_advantage
            with pytest.raises(ValueError, match="expected one of .*vanilla.*; got 'nothing'"):
                core.get_policy_loss_fn("nothing")
            core.compute_policy_loss_clip_cov(x.old, x.log_prob, x.advantages, x.mask, "token-mean", config())
        assert report.calls["agg_loss"] == 2
        assert "importer.agg" in report.replaced["agg_loss"]
    finally:
        core.POLICY_LOSS_REGISTRY["sapo"] = verls
        del sys.modules["importer"]
    assert before == {name: getattr(core, name) for name in before}
    assert importer.agg is before["agg_loss"]  # type: ignore[attr-defined]
