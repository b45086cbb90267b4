"""Our functions and classes with OpenRLHF's signatures against OpenRLHF's own, in float64.

Its modules need deepspeed, ray and others to be importable, and call nothing of them here: they are stood in for where
they are not installed.
"""

import ast
import importlib
import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import imported
from torch import Tensor

from rlhf_fast.integrations import openrlhf as ours

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("openrlhf is not installed", allow_module_level=True)


loss = imported("openrlhf.models.loss")
utils = imported("openrlhf.models.utils")
seeds = pytest.mark.parametrize("seed", range(4))


def tokens(seed: int) -> SimpleNamespace:
    """(5, 7) in float64, with log-probs < 0 and ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(seed)
    first, noise, advantages, other, more = torch.randn(5, 5, 7, generator=generator, dtype=torch.float64).unbind()
    mask = (torch.rand(5, 7, generator=generator) < 0.7).long()
    mask[0], mask[4, 1:], mask[:, 0] = 1, 0, 1
    old = -first.abs() - 1
    return SimpleNamespace(
        log_probs=(old + 0.3 * noise).requires_grad_(), old=old, rollout=old + 0.5 * more, advantages=advantages,
        other=other, mask=mask,
    )  # fmt: skip


def same(own: Tensor, theirs: Tensor, by: Tensor, rtol: float = 1e-6, atol: float = 1e-9) -> None:
    """Values and gradients. OpenRLHF adds 1e-8 to its divisors."""
    torch.testing.assert_close(own, theirs.to(own.dtype), rtol=rtol, atol=atol)
    grads = [torch.autograd.grad(each, by, retain_graph=True)[0] for each in (own.sum(), theirs.sum())]
    torch.testing.assert_close(*grads, rtol=rtol, atol=atol)


SIZES = [{}, {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 9.0}]


@seeds
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("by_token", [True, False])
def test_aggregation_sft_and_values(seed: int, sizes: dict[str, Any], by_token: bool) -> None:
    x = tokens(seed)
    args = (x.log_probs, x.mask, by_token)
    same(ours.aggregate_loss(*args, **sizes), loss.aggregate_loss(*args, **sizes), x.log_probs)
    own, theirs = (module.SFTLoss(by_token)(x.log_probs, x.mask, **sizes) for module in (ours, loss))
    same(own, theirs, x.log_probs)
    for clip in (None, 0.2):
        args = (x.log_probs, x.old, x.other, x.mask)
        own, theirs = (module.ValueLoss(clip, by_token)(*args, **sizes) for module in (ours, loss))
        same(own, theirs, x.log_probs)


CORRECTIONS = [
    {},
    {"is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_mode": "clip"},
    {"is_correction_level": "seq", "is_correction_threshold": [0.8, 1.25]},
    *(
        {"is_correction_level": level, "is_correction_gating": gating, "is_correction_threshold": [0.0, 0.03]}
        for level, gating in itertools.product(("token", "seq"), ("binary_kl", "tv"))
    ),
]


@seeds
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("dual_clip", [None, 1.1])
def test_policy_loss(seed: int, kind: str, correction: dict[str, Any], dual_clip: float | None) -> None:
    x = tokens(seed)
    by_token, sizes = seed % 2 == 0, SIZES[seed // 2]
    made = [module.PolicyLoss(0.1, 0.15, dual_clip, by_token, kind, **correction) for module in (ours, loss)]
    own, theirs = (each(x.log_probs, x.old, x.advantages, x.mask, x.rollout, **sizes) for each in made)
    same(own[0], theirs[0], x.log_probs)
    for a, b in zip(own[1:], theirs[1:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=1e-6, atol=1e-7)


def test_refused_settings() -> None:
    for settings in (
        {"is_correction_level": "row"},
        {"is_correction_mode": "drop"},
        {"is_correction_gating": "kl"},
        {"is_correction_mode": "clip", "is_correction_level": "seq"},
        {"is_correction_gating": "tv", "is_correction_level": "token"},
    ):
        for module in (ours, loss):
            with pytest.raises(ValueError):
                module.PolicyLoss(**settings)


@seeds
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_kl(seed: int, estimator: str, unbiased: bool) -> None:
    """OpenRLHF's in float32, where its k3 loses digits near 0. Past the bounds: log ratios of -20, 20 and -3."""
    x = tokens(seed)
    base = x.other.float()
    log_probs = (base + 0.5 * x.advantages.float()).detach()
    log_probs[0, :3] = base[0, :3] + torch.tensor([-20.0, 20.0, -3.0])
    log_probs.requires_grad_()
    for old in (None, x.old.float()):
        args = (log_probs, base, old, estimator, unbiased)
        same(ours.compute_approx_kl(*args), utils.compute_approx_kl(*args), log_probs, rtol=1e-4, atol=1e-6)


@seeds
def test_preferences(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, *others = torch.randn(4, 6, generator=generator, dtype=torch.float64).unbind()
    chosen.requires_grad_()
    for settings in ({}, {"label_smoothing": 0.1}, {"ipo": True}, {"ipo": True, "label_smoothing": 0.1}):
        own, theirs = (module.DPOLoss(0.3, **settings)(chosen, rejected, *others) for module in (ours, loss))
        same(own[0], theirs[0], chosen)
        torch.testing.assert_close(own[1:], theirs[1:])
    for name, margin in itertools.product(("PairWiseLoss", "LogExpLoss"), (None, others[0].abs())):
        columns = [each if each is None else each[:, None] for each in (chosen, rejected, margin)]
        own, theirs = (getattr(module, name)()(*columns) for module in (ours, loss))
        same(own, theirs, chosen)


@seeds
def test_from_logits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, 6, 40, generator=generator)
    labels = torch.randint(40, (3, 6), generator=generator)
    for temperature in (1.0, 0.7):
        grown = logits.clone().requires_grad_()
        own = ours.log_probs_from_logits(grown, labels, temperature)
        theirs = utils.log_probs_from_logits(grown * 1.0, labels, temperature)  # OpenRLHF divides in place
        same(own, theirs, grown, rtol=1e-3, atol=1e-5)
    log_p = logits.double().log_softmax(-1)
    exact = -(log_p.exp() * log_p).sum(-1)  # OpenRLHF compiles its own
    torch.testing.assert_close(ours.compute_entropy(logits).double(), exact, rtol=1e-5, atol=1e-6)


def of_the_maker(name: str) -> Any:
    """A method of RemoteExperienceMaker, from its source: the module itself starts deepspeed and ray."""
    folder = importlib.util.find_spec("openrlhf").submodule_search_locations[0]  # type: ignore[union-attr, index]
    tree = ast.parse((Path(folder) / "trainer/ppo_utils/experience_maker.py").read_text())
    (method,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    names: dict[str, Any] = {"torch": torch, "Tuple": tuple}
    exec(compile(ast.Module([method], []), folder, "exec"), names)
    return names[name]


@seeds
def test_advantages(seed: int) -> None:
    x = tokens(seed)
    for mask in (x.mask, None):
        own = ours.get_advantages_and_returns(None, x.other, x.advantages, mask, 0.97, 0.9)
        theirs = of_the_maker("get_advantages_and_returns")(None, x.other, x.advantages, mask, 0.97, 0.9)
        torch.testing.assert_close(own, theirs)
        own = ours.get_cumulative_returns(None, x.advantages, mask, 0.97)
        torch.testing.assert_close(own, of_the_maker("get_cumulative_returns")(None, x.advantages, mask, 0.97))


def test_the_patch() -> None:
    """Names that other modules imported lead to ours, and the report counts what was made and called."""
    models, x = imported("openrlhf.models"), tokens(0)
    tensors = (x.log_probs, x.old, x.advantages, x.mask)
    theirs, expected = models.PolicyLoss, models.PolicyLoss()(*tensors)[0]
    with ours.patched() as report:
        policy = models.PolicyLoss()
        assert isinstance(policy, ours.PolicyLoss)
        same(policy(*tensors)[0], expected, x.log_probs)
        models.aggregate_loss(x.log_probs, x.mask)
    assert report.calls == {"PolicyLoss": 1, "aggregate_loss": 1}
    assert "openrlhf.models.PolicyLoss" in report.replaced["PolicyLoss"]
    assert models.PolicyLoss is theirs
