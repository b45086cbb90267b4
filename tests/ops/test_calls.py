"""Calls outside plain eager code and torch.compile, which must not break kernels that take raw pointers."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed
from devices import seeded
from op_table import LAYER_OPS, OPS, Op, make, outputs_and_grads
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

from rlhf_fast import ops

every_op = pytest.mark.parametrize("op", [*OPS, *LAYER_OPS], ids=lambda op: op.name)
pytestmark = pytest.mark.usefixtures("backend")


@every_op
def test_a_subclass_in_any_place(op: Op) -> None:
    """Both halves of a TwoTensor go through the op; each must come out as if it had gone alone."""
    case = make(op)
    expected, _ = outputs_and_grads(op.run, op, case, case.mask)
    for name, tensor in case.x.items():
        x = case.x | {name: TwoTensor(tensor, tensor.clone())}
        with torch.no_grad():
            for output, true in zip(op.run(x, case.targets, case.mask), expected, strict=True):
                for half in (output.a, output.b) if isinstance(output, TwoTensor) else (output,):
                    torch.testing.assert_close(half, true, rtol=1e-6, atol=1e-6)


@every_op
def test_inference_tensors(op: Op) -> None:
    """Log-probs and rewards of a rollout are inference tensors; the loss accepts them as constants."""
    case = make(op)
    expected, true_grads = outputs_and_grads(op.run, op, case, case.mask)
    constants = [name for name in case.x if name not in op.grads]
    with torch.inference_mode():
        for name in constants:
            case.x[name] = case.x[name].clone()
        targets, mask = case.targets.clone(), case.mask.clone()
    x = {name: tensor if name in constants else tensor.requires_grad_() for name, tensor in case.x.items()}
    outputs = op.run(x, targets, mask)
    for output, true in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.detach(), true, rtol=0, atol=0)
    if op.grads:
        generator = seeded(1)
        weights = [torch.rand(output.shape, generator=generator, dtype=torch.float64) for output in outputs
                   if output.requires_grad]  # fmt: skip
        parts = [output for output in outputs if output.requires_grad]
        total = sum((part.double() * weight).sum() for part, weight in zip(parts, weights, strict=True))
        grads = torch.autograd.grad(total, [x[name] for name in op.grads], materialize_grads=True)
        for name, grad in zip(op.grads, grads, strict=True):
            torch.testing.assert_close(grad, true_grads[name], rtol=0, atol=0)


def test_traced_by_make_fx() -> None:
    rewards, values = torch.rand(2, 3), torch.rand(2, 3)
    graph = make_fx(lambda rewards, values: ops.gae(rewards, values))(rewards, values)
    other = torch.rand(2, 3)
    torch.testing.assert_close(graph(other, values), ops.gae(other, values))


def test_vmapped() -> None:
    rewards, values = torch.rand(4, 2, 3), torch.rand(4, 2, 3)
    mapped = torch.vmap(ops.gae)(rewards, values)
    for result, true in zip(mapped, ops.gae(rewards.flatten(0, 1), values.flatten(0, 1)), strict=True):
        torch.testing.assert_close(result.flatten(0, 1), true)


def test_traced_by_jit() -> None:
    rewards, values = torch.rand(2, 3), torch.rand(2, 3)
    traced = torch.jit.trace(lambda rewards, values: ops.gae(rewards, values), (rewards, values))
    torch.testing.assert_close(traced(values, rewards), ops.gae(values, rewards))


def test_a_second_derivative_is_right_or_refused(backend: str) -> None:
    """Without its part, what a penalty on the gradient gives would be wrong and look right."""
    x = torch.tensor([[0.1, -0.2, 0.3]], requires_grad=True)
    zeros = torch.zeros(1, 3)
    loss = ops.clipped_policy_loss(x, zeros, zeros + 1, clip_low=1.0, clip_high=9.0).loss
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    if backend != "torch":
        with pytest.raises(RuntimeError, match="rlhf_fast.clipped_policy_loss has no second derivative"):
            grad.square().sum().backward()
        return
    (mine,) = torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(mine, 2 * (2 * x).exp() / 9)  # the gradient is -e^x / 3


def test_a_second_derivative_through_a_head_is_refused(backend: str) -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    logprobs = ops.linear_logprobs(hidden, weight, torch.tensor([0, 3, 6]))
    for grad in torch.autograd.grad(logprobs.square().sum(), (hidden, weight), create_graph=True):
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.square().sum().backward()


def test_the_loss_may_be_changed_in_place() -> None:
    """As ``loss /= accumulation_steps`` does."""
    op = next(op for op in OPS if op.name == "linear_policy_loss")
    case = make(op)
    hidden = case.x["hidden"].requires_grad_()
    arguments = (case.x["weight"], case.targets, case.x["old_logprobs"], case.x["advantages"], case.mask)
    (whole,) = torch.autograd.grad(ops.linear_policy_loss(hidden, *arguments).loss, hidden)
    loss = ops.linear_policy_loss(hidden, *arguments).loss
    loss /= 4
    (quarter,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(quarter, whole / 4)


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "ref_logprobs"])
def test_tokens_in_double_beside_hidden_states_in_single(name: str) -> None:
    """As numpy gives them; eager and compiled results are float32 like the hidden states."""
    torch.compiler.reset()
    op = next(op for op in OPS if op.name == "linear_policy_loss")
    case = make(op)
    expected = op.run(case.x, case.targets, case.mask)
    x = case.x | {name: case.x[name].double()}
    compiled = torch.compile(op.run, fullgraph=True, backend="aot_eager")
    for call in (op.run, compiled):
        for output, true in zip(call(x, case.targets, case.mask), expected, strict=True):
            torch.testing.assert_close(output, true)


def test_the_default_dtype_does_not_matter() -> None:
    x = torch.full((1, 3), -0.1, dtype=torch.float32)
    expected = ops.clipped_policy_loss(x, x, x, num_items=100001).loss
    torch.set_default_dtype(torch.float16)
    try:
        torch.testing.assert_close(ops.clipped_policy_loss(x, x, x, num_items=100001).loss, expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_tensor_is_not_taken_for_a_number() -> None:
    half = torch.tensor(0.5)
    x, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    calls: list[Callable[[], object]] = [
        lambda: ops.gae(x, x, gamma=half),
        lambda: ops.gae(x, x, lam=half),
        lambda: ops.clipped_policy_loss(x, x, x, clip_low=half),
        lambda: ops.clipped_policy_loss(x, x, x, clip_high=half),
        lambda: ops.clipped_policy_loss(x, x, x, dual_clip=half + 1),
        lambda: ops.clipped_value_loss(x, x, x, clip=half),
        lambda: ops.masked_logprobs(x, targets, softcap=half),
        lambda: ops.linear_policy_loss(x, x, targets, x[:, 0], x[:, 0], ref_logprobs=x[:, 0], kl_coef=half),
        lambda: ops.linear_policy_loss(x, x, targets, x[:, 0], x[:, 0], entropy_coef=half),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"must be a number; got a tensor of shape \(\): .item\(\) it"):
            call()


def test_nan_of_any_bits_is_nan() -> None:
    """The payload of a NaN must not be read as digits."""
    for bits in (0x7FC00001, 0x7F800001, -1):
        x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        zero = torch.zeros(1)
        assert ops.clipped_policy_loss(x, zero, zero + 1).loss.isnan()
        assert ops.token_kl(x, zero).isnan().all()
        assert ops.masked_whiten(x).isnan().all()


@every_op
def test_a_tensor_spread_over_ranks_is_refused(op: Op) -> None:
    """By name, and with what to pass instead; in place of torch's line about sharding strategies."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        case = make(op)
        for name, tensor in case.x.items():
            label = {"A": "lora A", "B": "lora B"}.get(name, name)
            with pytest.raises(TypeError, match=rf"{op.name}: {label} must be a whole tensor; got a DTensor"):
                op.run(case.x | {name: distribute_tensor(tensor.cpu(), mesh)}, case.targets, case.mask)
    finally:
        torch.distributed.destroy_process_group()
