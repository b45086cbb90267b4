"""Inside torch.autocast, as in other trainers: every op on every backend, with the inputs that F.linear accepts.

The truth is the formula in float64, on the operands as autocast rounds them; nothing else may be rounded.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from devices import seeded
from op_table import OPS, Case, Op, Tensors, make, outputs_and_grads
from torch import Tensor

from rlhf_fast import ops

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HIDDEN = ("hidden", "ref_hidden")

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
head_op = pytest.mark.parametrize("op", [op for op in OPS if op.shared], ids=lambda op: op.name)
mixes = pytest.mark.parametrize(
    ("autocast", "hidden", "head"),
    [(BF16, BF16, FP32), (BF16, FP32, BF16), (BF16, FP32, FP32), (FP16, FP16, FP32), (FP16, FP32, FP16)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
pytestmark = pytest.mark.usefixtures("backend")


def inside(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, dtype)


def mixed(op: Op, hidden: torch.dtype, head: torch.dtype) -> Case:
    """Hidden states in one dtype and the weight in another; bias and adapter in float32, as PEFT keeps them."""
    case = make(op)
    for name in case.x:
        if name in HIDDEN:
            case.x[name] = case.x[name].to(hidden)
        if name == "weight":
            case.x[name] = case.x[name].to(head)
    return case


def truth(op: Op, case: Case, rounded: torch.dtype) -> tuple[tuple[Tensor, ...], Tensors]:
    exact = {
        name: (tensor.to(rounded) if name in (*HIDDEN, "weight") else tensor).double()
        for name, tensor in case.x.items()
    }
    return outputs_and_grads(op.naive, op, Case(exact, case.targets, case.mask), case.mask)


@every_op
@mixes
def test_autocast_in_both_directions(op: Op, autocast: torch.dtype, hidden: torch.dtype, head: torch.dtype) -> None:
    """Results in float32, gradients in the dtype of their tensors."""
    case = mixed(op, hidden, head)
    with inside(autocast):
        outputs, grads = outputs_and_grads(op.run, op, case, case.mask)
    true_outputs, true_grads = truth(op, case, autocast)
    for ours, true in zip(outputs, true_outputs, strict=True):
        assert ours.dtype == FP32
        torch.testing.assert_close(ours.double(), true, rtol=2e-5, atol=2e-5)
    rounding = 2e-2 if op.shared else 1e-5
    for name in op.grads:
        assert grads[name].dtype == case.x[name].dtype
        if name not in op.constants:
            torch.testing.assert_close(grads[name].double(), true_grads[name], rtol=rounding, atol=rounding)


@every_op
def test_the_backward_does_not_see_an_autocast(op: Op) -> None:
    """Forward and backward inside or outside: the products of either are not rounded."""
    case = make(op)

    def grads(forward: bool, backward: bool) -> tuple[Tensor, ...]:
        x = {name: tensor.detach().requires_grad_(name in op.grads) for name, tensor in case.x.items()}
        with inside(BF16) if forward else contextlib.nullcontext():
            outputs = [output for output in op.run(x, case.targets, case.mask) if output.requires_grad]
        total = torch.stack([output.double().sum() for output in outputs]).sum()
        with inside(BF16) if backward else contextlib.nullcontext():
            return torch.autograd.grad(total, [x[name] for name in op.grads], materialize_grads=True)

    if op.grads:
        for forward in (False, True):
            for ours, plain in zip(grads(forward, True), grads(forward, False), strict=True):
                assert torch.equal(ours, plain)


@head_op
def test_what_autocast_leaves_alone(op: Op) -> None:
    """float64 stays float64, as in F.linear, which then refuses another dtype beside it; and so without autocast."""
    plain = make(op, dtype=FP64)
    expected = outputs_and_grads(op.run, op, plain, plain.mask)
    with inside(BF16):
        torch.testing.assert_close(outputs_and_grads(op.run, op, plain, plain.mask), expected, rtol=0, atol=0)
        half_way = mixed(op, FP64, FP32)
        with pytest.raises(TypeError, match=f"{op.name}: weight must be torch.float64 like hidden; got torch.float32"):
            op.run(half_way.x, half_way.targets, half_way.mask)
    case = mixed(op, BF16, FP32)
    with pytest.raises(TypeError, match=f"{op.name}: weight must be torch.bfloat16 .*inside torch.autocast"):
        op.run(case.x, case.targets, case.mask)
    with inside(BF16), torch.autocast(torch.get_default_device().type, enabled=False), pytest.raises(TypeError):
        op.run(case.x, case.targets, case.mask)


def test_what_f_linear_and_log_softmax_give() -> None:
    """As in a real trainer: a bfloat16 hidden state from a layer inside autocast, a float32 head that is trained."""
    generator = seeded(0)
    x, weight = torch.randn(3, 8, generator=generator), torch.randn(11, 8, generator=generator, requires_grad=True)
    layer, targets = torch.nn.Linear(8, 8), torch.tensor([1, 2, 3])
    with inside(BF16):
        hidden = layer(x)
        assert hidden.dtype == BF16
        theirs = F.linear(hidden, weight).float().log_softmax(-1)[torch.arange(3), targets]
        ours = ops.linear_logprobs(hidden, weight, targets)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    for mine, true in zip(
        torch.autograd.grad(ours.sum(), (weight, layer.weight), retain_graph=True),
        torch.autograd.grad(theirs.sum(), (weight, layer.weight)),
        strict=True,
    ):
        assert mine.dtype == true.dtype == FP32
        torch.testing.assert_close(mine, true, rtol=3e-2, atol=3e-2)


def test_the_gradient_of_a_float32_head_is_not_rounded() -> None:
    """Inside autocast the head's operand is bfloat16 and its gradient float32, in the reference."""
    generator = seeded(0)
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(11, 8, generator=generator)
    targets, leaf, exact = torch.tensor([1, 2, 3]), weight.requires_grad_(), weight.detach().bfloat16().double()
    with ops.use_backend("torch"), inside(BF16):
        (grad,) = torch.autograd.grad(ops.linear_logprobs(hidden, leaf, targets).sum(), leaf)
    (true,) = torch.autograd.grad(
        ops.linear_logprobs(hidden.bfloat16().double(), exact.requires_grad_(), targets).sum(), exact
    )
    torch.testing.assert_close(grad.double(), true, rtol=1e-5, atol=1e-6)
