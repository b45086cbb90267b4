"""torch.compile(fullgraph=True) of every public function, and torch.library.opcheck of every custom op under them."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed
from devices import GPU, GPU_BACKENDS, device_of, interpreted
from op_table import LAYER_OPS, OPS, Case, Op, Tensors, make, outputs_and_grads
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast import ops
from rlhf_fast.kernels.records import RowOutputs
from rlhf_fast.ops import _dispatch, _native, use_backend

every_op = pytest.mark.parametrize("op", [*OPS, *LAYER_OPS], ids=lambda op: op.name)
QUICK = ("exact_kl", "token_kl", "clipped_policy_loss", "gae")  # the other references take long with dynamic shapes


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def agree(compiled: Callable[..., Any], op: Op, case: Case, mask: Tensor | None) -> None:
    """Compiled and eager give the same outputs and gradients, but for products that sum in another order."""
    for ours, eager in zip(
        outputs_and_grads(compiled, op, case, mask), outputs_and_grads(op.run, op, case, mask), strict=True
    ):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


@every_op
def test_compiled_is_eager(op: Op, backend: str) -> None:
    """One graph serves every batch size, and another one the calls without a mask."""
    thorough = op.name in QUICK if backend == "torch" else not interpreted(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.run, fullgraph=True, dynamic=thorough or None, backend=counter)
    first, second = (make(op, shape, torch.float32) for shape in ((3, 5), (4, 6)))
    agree(compiled, op, first, first.mask)
    if not thorough:
        return
    graphs = counter.frame_count
    agree(compiled, op, second, second.mask)
    assert counter.frame_count == graphs
    agree(compiled, op, first, None)


OPTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "one output": ("masked_logprobs", lambda x, targets, mask: ops.masked_logprobs(x["logits"], targets, mask)),
    "padded vocabulary": (
        "masked_logprobs",
        lambda x, targets, mask: ops.masked_logprobs(
            x["logits"].transpose(0, 1), (targets % 5).T, softcap=3.0, vocab_size=5, temperature=mask.T + 0.5
        ),
    ),
    "in place": (
        "masked_logprobs",
        lambda x, targets, mask: ops.masked_logprobs(x["logits"] * 1.0, targets, mask, inplace_backward=True),
    ),
    "in place, two": (
        "exact_kl",
        lambda x, targets, mask: ops.exact_kl(x["logits"] * 1.0, x["ref_logits"], mask, inplace_backward=True),
    ),
    "frozen head": (
        "linear_logprobs",
        lambda x, targets, mask: ops.linear_logprobs(x["hidden"], x["weight"].detach(), targets, mask, softcap=3.0),
    ),
    "no reduction": (
        "linear_cross_entropy",
        lambda x, targets, mask: ops.linear_cross_entropy(x["hidden"], x["weight"], targets, reduction="none"),
    ),
    "divisor": (
        "linear_cross_entropy",
        lambda x, targets, mask: ops.linear_cross_entropy(x["hidden"], x["weight"], targets, num_items=mask.sum()),
    ),
    "sequence ratio": (
        "linear_policy_loss",
        lambda x, targets, mask: ops.linear_policy_loss(
            x["hidden"], x["weight"], targets, x["old_logprobs"], x["advantages"], mask, ratio_level="sequence"
        ),
    ),
    "straight-through": (
        "token_kl",
        lambda x, targets, mask: ops.token_kl(x["logprobs"], x["ref_logprobs"], mask, estimator="k3+"),
    ),
    "packed and whitened": (
        "gae",
        lambda x, targets, mask: ops.gae(
            x["rewards"].flatten(), x["values"].flatten(), mask.flatten(), cu_seqlens=packing(mask), whiten=True
        ),
    ),
    "scale alone": (
        "masked_whiten",
        lambda x, targets, mask: ops.masked_whiten(x["x"], mask, shift_mean=False, unbiased=False),
    ),
    "sequences": (
        "clipped_policy_loss",
        lambda x, targets, mask: ops.clipped_policy_loss(
            x["logprobs"], x["old_logprobs"], x["advantages"], mask, ratio_level="sequence", dual_clip=3.0,
            aggregation="seq-mean-token-mean", num_items=mask.sum(),
        ),
    ),
    "without clip": (
        "clipped_value_loss",
        lambda x, targets, mask: ops.clipped_value_loss(
            x["values"], x["old_values"], x["returns"], mask, clip=None, aggregation="seq-mean-token-sum", num_items=7
        ),
    ),
    "joint by sequences": (
        "ppo_loss",
        lambda x, targets, mask: ops.ppo_loss(
            **x, mask=mask, value_clip=None, kl_coef=0.1, kl_estimator="k1+", aggregation="seq-mean-token-mean",
            num_items=mask.sum(),
        ),
    ),
}  # fmt: skip


def packing(mask: Tensor) -> Tensor:
    """Bounds of an empty sequence, one of 4 tokens and the rest."""
    return torch.tensor([0, 0, 4, mask.numel()])


def with_options(label: str) -> Op:
    name, call = OPTIONS[label]

    def run(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        result = call(x, targets, mask)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return replace(next(op for op in OPS if op.name == name), run=run)


@pytest.mark.parametrize("label", OPTIONS)
def test_compiled_options(label: str, backend: str) -> None:
    op = with_options(label)
    case = make(op, dtype=torch.float32)
    agree(torch.compile(op.run, fullgraph=True, backend="aot_eager"), op, case, case.mask)


@pytest.mark.parametrize("op", [op for op in OPS if op.shared], ids=lambda op: op.name)
@pytest.mark.parametrize("where", ["around the graph", "in the graph"])
def test_compiled_under_autocast(op: Op, where: str, backend: str) -> None:
    """A bfloat16 hidden state beside a float32 head, as eager takes it."""
    device = device_of(backend)
    case = make(op)
    case.x |= {name: tensor.bfloat16() for name, tensor in case.x.items() if name in ("hidden", "ref_hidden")}

    def run(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            return op.run(x, targets, mask)

    if where == "in the graph":
        agree(torch.compile(run, fullgraph=True, backend="aot_eager"), replace(op, run=run), case, case.mask)
    else:
        with torch.autocast(device, torch.bfloat16):
            agree(torch.compile(op.run, fullgraph=True, backend="aot_eager"), op, case, case.mask)


@pytest.mark.parametrize("name", ["masked_logprobs", "clipped_policy_loss"])
def test_inductor(name: str) -> None:
    """The compiler that users have, around an op of its own kind of memory and one that it takes apart itself."""
    op = next(op for op in OPS if op.name == name)
    case = make(op, dtype=torch.float32)

    def shifted(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        return op.run({key: tensor.sin() for key, tensor in x.items()}, targets, mask)

    compiled = torch.compile(shifted, fullgraph=True)
    with use_backend("native" if name == "masked_logprobs" else "torch"):
        agree(compiled, replace(op, run=shifted), case, case.mask)


def test_use_backend_reaches_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marked results tell which implementation a call took."""

    def marked(mark: float) -> Callable[..., Any]:
        return lambda inputs: RowOutputs(inputs.logits.sum(1) * 0 + mark)

    row = {"torch": marked(0.0), "fused": marked(1.0)}
    monkeypatch.setitem(_dispatch._table, "masked_logprobs", row)
    monkeypatch.delenv("RLHF_FAST_BACKEND", raising=False)
    compiled = torch.compile(ops.masked_logprobs, fullgraph=True, backend="eager")
    logits, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for _ in range(2):
        assert compiled(logits, targets).tolist() == [1.0, 1.0]
        with use_backend("torch"):
            assert compiled(logits, targets).tolist() == [0.0, 0.0]
        with use_backend("native"):
            assert compiled(logits, targets).tolist() == [1.0, 1.0]
        assert compiled(logits.double(), targets).tolist() == [0.0, 0.0]
        with use_backend("cuda"), pytest.raises(Exception, match="'cuda' was asked for"):
            compiled(logits, targets)


def test_a_backend_passed_over_is_said_once_by_compiled_code_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch.ENGINES["cpu"]["native"], "reason", "no vectors")
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(_dispatch, "_forced", None)
    monkeypatch.delenv("RLHF_FAST_BACKEND", raising=False)
    op = OPS[0]
    case = make(op, dtype=torch.float32)
    compiled = torch.compile(op.run, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match=f"{op.name}: backend 'native' cannot run here .*: no vectors"):
        compiled(case.x, case.targets, None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=op.name)
        compiled(case.x, case.targets, case.mask)
        op.run(case.x, case.targets, None)


class Calls(TorchDispatchMode):
    """Every call of a custom op of ours, with copies of its arguments: op name -> argument tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "rlhf_fast":
            differentiable = not function.name().endswith("_backward")
            copies = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: copied(tensor, differentiable), args)
            self.seen.setdefault(function.name(), []).append(copies)
        return function(*args, **(kwargs or {}))


def copied(tensor: Tensor, differentiable: bool) -> Tensor:
    """Same values and strides, and the same need for a gradient where there can be one."""
    copy = tensor.new_empty(0).set_(
        tensor.detach().untyped_storage().clone(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    return copy.requires_grad_(tensor.requires_grad and differentiable)


@pytest.fixture(scope="module")
def calls() -> dict[str, list[tuple[Any, ...]]]:
    """What the public functions pass to the custom ops where torch.compile traces them."""
    recorder = Calls()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
        for backend in ("native", "torch", *(GPU_BACKENDS if GPU else ())):
            with use_backend(backend), torch.device(device_of(backend)), recorder:
                for op in [*OPS, *LAYER_OPS, *map(with_options, OPTIONS)]:
                    for dtype in (torch.float32, torch.bfloat16):
                        case = make(op, (2, 3), dtype)
                        outputs_and_grads(op.run, op, case, case.mask)
                ops.masked_whiten(torch.rand(5), group=object())  # type: ignore[arg-type]
        patch.setattr(_native, "multiplies_float32", lambda: True)  # which depends on the processor
        with recorder:
            ops.lora_linear(torch.rand(2, 3), torch.rand(4, 3), None)
            rows = torch.rand(3, 4, 6, 8, requires_grad=True)  # of 4 heads, 6 tokens
            mask, starts = torch.ones(4, 4, dtype=torch.bool).tril(), torch.tensor([0, 2, 6])
            ops.short_attention(*rows, mask, starts, 0.5).sum().backward()
            if _native.multiplies_bfloat16():
                patch.setattr(_native, "prefers_bfloat16", lambda: True)
                ops.lora_linear(torch.rand(2, 3).bfloat16(), torch.rand(4, 3).bfloat16(), None)
    return recorder.seen


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rlhf_fast::"))
)
def test_opcheck(name: str, calls: dict[str, list[tuple[Any, ...]]]) -> None:
    """Schema, fake, autograd formula and dynamic shapes, on what the public functions pass."""
    if name == "rlhf_fast::bfloat16_product" and not _native.multiplies_bfloat16():
        pytest.skip("needs AVX-512 BF16")
    assert name in calls, f"no row of OPS or OPTIONS reaches {name}"
    function = getattr(torch.ops.rlhf_fast, name.removeprefix("rlhf_fast::")).default
    for arguments in calls[name]:
        torch.library.opcheck(function, arguments)
