"""torch.func and meta tensors. torch.func transforms the torch references; a warning says that kernels are not used."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from op_table import LAYER_OPS, OPS, Case, Op, Tensors, make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

from rlhf_fast import ops
from rlhf_fast.ops import _dispatch, use_backend

ALL = [*OPS, *LAYER_OPS]
every_op = pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
trained_op = pytest.mark.parametrize("op", [op for op in ALL if op.grads], ids=lambda op: op.name)


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_dispatch, "_forced", None)
    monkeypatch.delenv("RLHF_FAST_BACKEND", raising=False)
    monkeypatch.setattr(_dispatch, "_warned", {(op.name, "native") for op in ALL})
    yield


def loss(op: Op, case: Case) -> Callable[[Tensors], Tensor]:
    """The sum of all outputs, of what is trained."""

    def call(trained: Tensors) -> Tensor:
        outputs = op.run(case.x | trained, case.targets, case.mask)
        return torch.stack([output.sum() for output in outputs]).sum()

    return call


def several(op: Op, case: Case) -> Tensors:
    return {name: torch.stack([case.x[name] * scale for scale in (0.9, 1.0, 1.1)]) for name in op.grads}


def true_gradients(op: Op, case: Case) -> list[Tensors]:
    """By autograd, one of ``several`` after the other."""
    gradients = []
    for i in range(3):
        leaves = {name: tensor[i].clone().requires_grad_() for name, tensor in several(op, case).items()}
        found = torch.autograd.grad(loss(op, case)(leaves), list(leaves.values()))
        gradients.append(dict(zip(leaves, found, strict=True)))
    return gradients


@trained_op
def test_grad(op: Op) -> None:
    case = make(op)
    first = {name: tensor[0] for name, tensor in several(op, case).items()}
    torch.testing.assert_close(grad(loss(op, case))(first), true_gradients(op, case)[0], rtol=1e-5, atol=1e-6)


@trained_op
def test_a_gradient_for_each_sample(op: Op) -> None:
    """vmap over grad, and grad over vmap."""
    case = make(op)
    stacked = several(op, case)
    mapped = vmap(grad(loss(op, case)))(stacked)
    summed = grad(lambda trained: vmap(loss(op, case))(trained).sum())(stacked)
    for i, true in enumerate(true_gradients(op, case)):
        for name in op.grads:
            torch.testing.assert_close(mapped[name][i], true[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(summed[name][i], true[name], rtol=1e-5, atol=1e-6)


@trained_op
def test_autograd_through_vmap(op: Op) -> None:
    case = make(op)
    stacked = {name: tensor.requires_grad_() for name, tensor in several(op, case).items()}
    found = torch.autograd.grad(vmap(loss(op, case))(stacked).sum(), list(stacked.values()))
    for i, true in enumerate(true_gradients(op, case)):
        for name, gradient in zip(stacked, found, strict=True):
            torch.testing.assert_close(gradient[i], true[name], rtol=1e-5, atol=1e-6)


@trained_op
def test_grad_of_grad_is_right_or_refused(op: Op) -> None:
    if op.name == "cispo_loss" or op.grads[0] in op.constants:
        return  # its first derivative takes a weight as a constant, which differences of it do not
    case = make(op, dtype=torch.float64)
    name = op.grads[0]

    def penalty(tensor: Tensor) -> Tensor:
        return grad(lambda inner: loss(op, case)({name: inner}))(tensor).square().sum()

    if op.has_vocabulary:
        with pytest.raises(RuntimeError, match="has no second derivative"):
            grad(penalty)(case.x[name])
        return
    direction = torch.randn(case.x[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-6 * direction
    by_differences = (penalty(case.x[name] + step) - penalty(case.x[name] - step)) / 2e-6
    slope = (grad(penalty)(case.x[name]) * direction).sum()
    torch.testing.assert_close(slope, by_differences, rtol=1e-6, atol=1e-8)


def test_the_backend_passed_over_is_said_and_a_forced_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_warned", set())
    logprobs = torch.tensor([0.5, 1.0])

    def k2(logprobs: Tensor) -> Tensor:
        return ops.token_kl(logprobs, torch.zeros(2), estimator="k2").sum()

    with pytest.warns(UserWarning, match="token_kl: backend 'native' .*torch.func transforms only the torch reference"):
        assert torch.equal(grad(k2)(logprobs), logprobs)
    with use_backend("native"), pytest.raises(RuntimeError, match="'native' was asked for .* torch.func"):
        grad(k2)(logprobs)
    with use_backend("torch"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(grad(k2)(logprobs), logprobs)


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_meta_tensors(op: Op, dtype: torch.dtype) -> None:
    """Shapes and dtypes, of outputs and gradients, without a value anywhere."""
    case = make(op, dtype=dtype)
    expected = op.run(case.x, case.targets, case.mask)
    x = {name: tensor.to("meta").requires_grad_(name in op.grads) for name, tensor in case.x.items()}
    for mask in (case.mask.to("meta"), case.mask.float().to("meta"), None):
        outputs = op.run(x, case.targets.to("meta"), mask)
        for output, true in zip(outputs, expected, strict=True):
            assert (output.device.type, output.shape, output.dtype) == ("meta", true.shape, true.dtype)
    if op.grads:
        total = torch.stack([output.sum() for output in outputs if output.requires_grad]).sum()
        for name, gradient in zip(op.grads, torch.autograd.grad(total, [x[name] for name in op.grads]), strict=True):
            assert (gradient.device.type, gradient.shape, gradient.dtype) == ("meta", x[name].shape, dtype)


@every_op
def test_fake_tensors(op: Op) -> None:
    """Of a tracer or a memory estimate, which have no values either."""
    with FakeTensorMode():
        case = make(op)
        outputs = op.run(case.x, case.targets, case.mask.float())
    case = make(op)
    assert [output.shape for output in outputs] == [true.shape for true in op.run(case.x, case.targets, case.mask)]
