"""Slices of logits, such as those of the responses of a batch, are read and overwritten where they lie."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import seeded
from torch import Tensor

from rlhf_fast.ops import _checks, exact_kl, masked_logprobs
from rlhf_fast.ops._dispatch import launch

B, T, V = 3, 6, 19
TARGETS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
MASK = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.7
Run = Callable[..., Tensor]


def logprobs_of(logits: Tensor, part: slice, **options: Any) -> Tensor:
    device = logits.device
    return masked_logprobs(logits, TARGETS[:, part].to(device), MASK[:, part].to(device), temperature=0.7, **options)


def kl_of(logits: Tensor, part: slice, **options: Any) -> Tensor:
    """The reference's logits are a slice too, of other strides."""
    ref_logits = torch.randn(B, T + 3, V + 2, generator=seeded(5))[:, 2:-1, :V][:, part]
    return exact_kl(logits, ref_logits, MASK[:, part].to(logits.device), temperature=0.7, **options)


every_op = pytest.mark.parametrize("run", [logprobs_of, kl_of])
every_part = pytest.mark.parametrize("part", [slice(2, 5), slice(0, 5), slice(1, None), slice(3, 4)], ids=str)
pytestmark = pytest.mark.usefixtures("backend")


def leaf() -> Tensor:
    return torch.randn(B, T, V, generator=seeded(0)).requires_grad_()


@every_op
@every_part
def test_a_slice_gives_what_its_copy_gives(run: Run, part: slice) -> None:
    whole = leaf()
    ours = run(whole[:, part], part)
    copy = whole.detach()[:, part].clone().requires_grad_()
    theirs = run(copy, part)
    assert torch.equal(ours, theirs)
    (grad,) = torch.autograd.grad(ours.sum(), whole)
    (grad_of_copy,) = torch.autograd.grad(theirs.sum(), copy)
    assert torch.equal(grad[:, part], grad_of_copy)
    grad[:, part] = 0
    assert not grad.any()


@every_op
@every_part
def test_in_place_the_gradient_takes_the_slices_place(run: Run, part: slice, backend: str) -> None:
    whole = leaf()
    logits = whole * 1.0
    (grad,) = torch.autograd.grad(run(logits[:, part], part, inplace_backward=True).sum(), whole)
    (plain,) = torch.autograd.grad(run(whole[:, part], part).sum(), whole)
    assert torch.equal(grad, plain)
    if backend != "torch":  # which works on a copy of a slice
        expected = whole.detach().clone()
        expected[:, part] = plain[:, part]
        assert torch.equal(logits.detach(), expected)


@every_op
def test_a_slice_is_not_copied(run: Run, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "torch":
        pytest.skip("the reference works on a copy of a slice")
    seen = []

    def watched(record: Any, like: Tensor) -> None:
        seen.append(record)
        launch(record, like)

    for name in ("masked_logprobs", "exact_kl"):
        monkeypatch.setattr(importlib.import_module(f"rlhf_fast.ops.{name}"), "launch", watched)
    logits = leaf().detach()[:, 1:-1]
    run(logits, slice(1, -1))
    assert [record.logits.data.data_ptr() for record in seen] == [logits.data_ptr()]


def test_the_kernel_leaves_ignored_targets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it must where the targets cannot be read beforehand."""
    whole = leaf()
    targets = TARGETS.to(whole.device).clone()
    targets[0, 1] = targets[2, 5] = -100
    plain = masked_logprobs(whole, targets, MASK.to(whole.device))
    (grad,) = torch.autograd.grad(plain.sum(), whole)
    monkeypatch.setattr(_checks, "at_hand", lambda tensor: False)
    ours = masked_logprobs(whole, targets, MASK.to(whole.device))
    assert torch.equal(ours, plain) and ours[0, 1] == 0
    assert torch.equal(torch.autograd.grad(ours.sum(), whole)[0], grad)
