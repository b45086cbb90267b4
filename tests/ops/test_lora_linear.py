"""lora_linear on every backend, against the plain formula in float64 and against PEFT. It has no mask, so that its edge
contract stands here and not in op_table.py.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from devices import seeded
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

from rlhf_fast.ops import lora_linear, use_backend

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INPUT, OUTPUTS, RANKS, SCALE = 20, (12, 7, 9), (4, 3, 40), 0.5
pytestmark = pytest.mark.usefixtures("backend")


class Case(NamedTuple):
    """Three layers; two segments, the second without an adapter on the second layer."""

    hidden: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    loras: list[list[Any]]
    rows: list[int]

    def leaves(self) -> list[Tensor]:
        adapters = [tensor for loras in self.loras for lora in loras if lora for tensor in lora[:2]]
        return [self.hidden, *self.weights, *self.biases, *adapters]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Case":
        loras = [[lora and (change(lora[0]), change(lora[1]), lora[2]) for lora in loras] for loras in self.loras]
        return Case(change(self.hidden), [*map(change, self.weights)], [*map(change, self.biases)], loras, self.rows)

    def run(self, **options: Any) -> tuple[Tensor, ...]:
        return lora_linear(self.hidden, self.weights, self.loras, biases=self.biases, rows=self.rows, **options)


def make(dtype: torch.dtype, rows: tuple[int, ...] = (30, 7), adapters: torch.dtype | None = None) -> Case:
    """The adapters are in float32, in float64 beside float64."""
    generator = seeded(0)
    adapters = adapters or (FP64 if dtype == FP64 else FP32)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=FP64).to(dtype).requires_grad_()

    loras = [
        [(normal(rank, INPUT, dtype=adapters), normal(size, rank, dtype=adapters), SCALE + segment)
         for rank, size in zip(RANKS, OUTPUTS, strict=True)]
        for segment in range(len(rows))
    ]  # fmt: skip
    loras[-1][1] = None
    weights, biases = [normal(size, INPUT) for size in OUTPUTS], [normal(size) for size in OUTPUTS]
    return Case(normal(sum(rows), INPUT), weights, biases, loras, list(rows))


def formula(case: Case) -> tuple[Tensor, ...]:
    segments = case.hidden.split(case.rows)
    outputs = []
    for layer, (weight, bias) in enumerate(zip(case.weights, case.biases, strict=True)):
        parts = []
        for part, loras in zip(segments, case.loras, strict=True):
            output = part @ weight.T + bias
            if loras[layer] is not None:
                down, up, scale = loras[layer]
                output = output + scale * ((part @ down.T) @ up.T)
            parts.append(output)
        outputs.append(torch.cat(parts))
    return tuple(outputs)


def outputs_and_grads(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    total = torch.zeros((), dtype=FP64)
    for number, output in enumerate(outputs):
        weights = torch.rand(output.shape, generator=seeded(number), dtype=FP64)
        total = total + (output.double() * weights).sum()
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, leaves, materialize_grads=True)]


def exact(case: Case) -> list[Tensor]:
    case = case.mapped(lambda tensor: tensor.detach().double().requires_grad_())
    return outputs_and_grads(formula(case), case.leaves())


def close(ours: list[Tensor], true: list[Tensor], rounding: float) -> None:
    """Within a share of each tensor's largest entry."""
    for mine, its in zip(ours, true, strict=True):
        assert (mine.double() - its.double()).abs().max() <= rounding * its.abs().max(), (mine, its)


# ---- values and gradients -------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """x = (1, 2), W = (3, 4), b = 5, A = (1, 1), B = (2): 3 + 8 + 5 + 10 * (3 * 2)."""
    one = torch.tensor
    down, up = one([[1.0, 1.0]], requires_grad=True), one([[2.0]], requires_grad=True)
    hidden = one([[1.0, 2.0]], requires_grad=True)
    output = lora_linear(hidden, one([[3.0, 4.0]]), (down, up, 10.0), biases=one([5.0]))
    assert output.tolist() == [[76.0]]
    grads = torch.autograd.grad(output.sum(), (hidden, down, up))
    assert [grad.tolist() for grad in grads] == [[[23.0, 24.0]], [[20.0, 40.0]], [[30.0]]]


@pytest.mark.parametrize(("dtype", "rounding"), [(FP64, 1e-12), (FP32, 2e-6), (BF16, 1.5e-2), (FP16, 2e-3)], ids=str)
def test_the_plain_formula(dtype: torch.dtype, rounding: float) -> None:
    case = make(dtype)
    ours = outputs_and_grads(case.run(), case.leaves())
    for mine, leaf in zip(ours[len(OUTPUTS) :], case.leaves(), strict=True):
        assert mine.dtype == leaf.dtype
    assert all(output.dtype == dtype for output in ours[: len(OUTPUTS)])
    close(ours, exact(case), rounding)


@pytest.mark.parametrize("adapters", [BF16, FP16, FP64], ids=str)
def test_adapters_of_another_dtype(adapters: torch.dtype) -> None:
    case = make(FP32, adapters=adapters)
    ours = outputs_and_grads(case.run(), case.leaves())
    assert ours[-1].dtype == adapters
    close(ours, exact(case), 1e-2)


def test_gradcheck() -> None:
    case = make(FP64, (2, 1))

    def call(*_: Tensor) -> tuple[Tensor, ...]:
        return case.run()

    assert torch.autograd.gradcheck(call, case.leaves(), fast_mode=True)


def test_one_layer_is_a_group_of_one() -> None:
    case = make(FP32, (37,))
    hidden = case.hidden.detach().unflatten(0, (37, 1))
    output = lora_linear(hidden, case.weights[0], case.loras[0][0], biases=case.biases[0])
    assert output.shape == (37, 1, OUTPUTS[0])
    torch.testing.assert_close(output.flatten(0, 1), formula(case)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(lora_linear(hidden, case.weights[0], None), F.linear(hidden, case.weights[0]))
    segments = [case.loras[0][0], None]
    output = lora_linear(case.hidden, case.weights[0], segments, biases=case.biases[0], rows=[30, 7])
    torch.testing.assert_close(output[:30], formula(case)[0][:30], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output[30:], F.linear(case.hidden[30:], case.weights[0], case.biases[0]))


@pytest.mark.parametrize("rows", [(0, 7), (7, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_empty_segments(rows: tuple[int, int], dtype: torch.dtype) -> None:
    case = make(dtype, rows)
    ours = outputs_and_grads(case.run(), case.leaves())
    for mine, true in zip(ours, exact(case), strict=True):
        assert mine.shape == true.shape
        torch.testing.assert_close(mine.double(), true.double(), rtol=2e-2, atol=5e-1 if dtype == BF16 else 1e-5)
    for loras, count in zip(case.loras, rows, strict=True):
        for lora in loras if count == 0 else ():
            for grad in torch.autograd.grad(sum(o.float().sum() for o in case.run()), lora[:2]) if lora else ():
                assert (grad == 0).all()


def test_weights_of_any_strides() -> None:
    """As GPT-2's, which are (I, O), and a sliced one; hidden states and adapters too."""
    case = make(FP32)

    def relaid(tensor: Tensor) -> Tensor:
        if tensor.dim() == 1:
            return tensor.detach().repeat_interleave(2)[::2].requires_grad_()
        return F.pad(tensor.detach().T, (1, 2))[:, 1:-2].T.requires_grad_()

    other = case.mapped(relaid)
    assert not other.weights[0].is_contiguous()
    ours, plain = (outputs_and_grads(each.run(), each.leaves()) for each in (other, case))
    close(ours, plain, 2e-6)


def test_a_nan_shows_in_its_row_alone() -> None:
    """And in no other layer."""
    for dtype in (FP32, BF16):
        case = make(dtype).mapped(lambda tensor: tensor.detach())
        clean = case.run()
        for poison in (torch.nan, torch.inf):
            case.hidden[8, 0] = poison
            for output, true in zip(case.run(), clean, strict=True):
                assert not output[8].isfinite().any()
                others = [row for row in range(37) if row != 8]
                assert torch.equal(output[others], true[others])
        case = make(dtype).mapped(lambda tensor: tensor.detach())
        case.loras[0][0][1][:] = torch.nan
        outputs = case.run()
        assert outputs[0][:30].isnan().all() and torch.equal(outputs[0][30:], clean[0][30:])
        assert torch.equal(outputs[1], clean[1]) and torch.equal(outputs[2], clean[2])


ODD_RANKS = """
import torch
from rlhf_fast.ops import lora_linear
hidden = torch.ones(64, 64, dtype=torch.bfloat16)
hidden[8, 0] = torch.nan
for rank in (1, 3, 36, 100):
    lora = torch.ones(rank, 64), torch.ones(96, rank), 1.0
    output = lora_linear(hidden, torch.ones(96, 64, dtype=torch.bfloat16), lora)
    assert output.isnan().any(1).nonzero().tolist() == [[8]], rank
"""


def test_a_nan_shows_in_its_row_alone_under_amx(backend: str) -> None:
    """Which conftest.py switches off, and which reads past a row of an odd rank."""
    if backend != "native":
        pytest.skip("once is enough")
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}
    subprocess.run([sys.executable, "-c", ODD_RANKS], env=environment, check=True)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_run_to_run(dtype: torch.dtype) -> None:
    case = make(dtype, (300, 212))
    first, second = (outputs_and_grads(case.run(), case.leaves()) for _ in range(2))
    for mine, again in zip(first, second, strict=True):
        assert torch.equal(mine, again)


# ---- what is kept and computed --------------------------------------------------------------------------------------


def kept_by(call: Callable[[], object]) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return kept


def test_nothing_is_kept_without_a_gradient() -> None:
    case = make(FP32)
    frozen = case.mapped(lambda tensor: tensor.detach())
    assert kept_by(frozen.run) == []
    with torch.no_grad():
        assert kept_by(case.run) == []


def test_the_input_is_kept_once_and_as_it_is(backend: str) -> None:
    """Beside it the weights and adapters, which are there anyway, and hidden A^T of each segment."""
    if backend == "torch":
        pytest.skip("the reference keeps what autograd keeps")
    case = make(FP32)
    kept = kept_by(case.run)
    of_hidden = [tensor for tensor in kept if tensor.shape[:1] in ((37,), (30,)) and tensor.shape[-1] == INPUT]
    assert len(of_hidden) == 1 and of_hidden[0].data_ptr() == case.hidden.data_ptr()
    narrow = sorted(tensor.shape for tensor in kept if tensor.shape[0] in (30, 37) and tensor.shape[-1] != INPUT)
    assert (30, sum(RANKS)) in narrow and all(width <= sum(RANKS) for _, width in narrow)


def test_a_frozen_weight_gets_no_product() -> None:
    case = make(FP32, (31, 6))
    for tensor in (*case.weights, *case.biases):
        tensor.requires_grad_(False)
    sizes: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if "mm" in function.name() or "product" in function.name():
                sizes.append((args[0] if result is None else result).shape)
            return result

    outputs = case.run()
    with Watch():
        torch.autograd.grad(sum(output.sum() for output in outputs), case.hidden)
    assert sizes and not {weight.shape for weight in case.weights} & set(sizes)


def test_only_what_is_wanted() -> None:
    """Each tensor trained alone gets the gradient that it gets among all."""
    case = make(FP32)
    every = outputs_and_grads(case.run(), case.leaves())[len(OUTPUTS) :]
    for number, true in enumerate(every):
        alone = case.mapped(lambda tensor: tensor.detach())
        leaf = alone.leaves()[number].requires_grad_()
        (mine,) = outputs_and_grads(alone.run(), [leaf])[len(OUTPUTS) :]
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_dropout_is_pefts(dtype: torch.dtype) -> None:
    """The same masks from the same seed, one a layer, in PEFT's order; outputs and gradients within rounding."""
    sizes, layers = (12, 7), []
    hidden = torch.randn(33, INPUT, generator=seeded(0)).to(dtype).requires_grad_()
    for size in sizes:
        linear = torch.nn.Linear(INPUT, size).to(dtype).requires_grad_(False)
        layer = peft_layer(linear, rank=4, dropout=0.4)
        layers.append(layer)
    loras = [
        (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]) for layer in layers
    ]
    leaves = [hidden, *(tensor for lora in loras for tensor in lora[:2])]
    weights, biases = [layer.base_layer.weight for layer in layers], [layer.base_layer.bias for layer in layers]
    torch.manual_seed(5)
    theirs = outputs_and_grads(tuple(layer(hidden) for layer in layers), leaves)
    torch.manual_seed(5)
    ours = outputs_and_grads(lora_linear(hidden, weights, loras, biases=biases, dropout=0.4), leaves)
    close(ours, theirs, 1e-5 if dtype == FP32 else 2e-2)
    torch.manual_seed(5)
    again = outputs_and_grads(lora_linear(hidden, weights, loras, biases=biases, dropout=0.4), leaves)
    assert all(torch.equal(mine, same) for mine, same in zip(ours, again, strict=True))


def peft_layer(linear: torch.nn.Linear, rank: int, dropout: float = 0.0) -> PeftLinear:
    config = LoraConfig(r=rank, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False)
    layer = PeftLinear(linear, "default", config=config, r=rank, lora_alpha=8)
    for part in (layer.lora_A, layer.lora_B):
        part.float()
    return layer.train()


@pytest.mark.parametrize(("dtype", "rounding"), [(FP32, 1e-5), (BF16, 2e-2)], ids=str)
def test_peft(dtype: torch.dtype, rounding: float) -> None:
    """In bfloat16 no further from float64 than twice PEFT's distance, where PEFT multiplies the adapters in float32."""
    layer = peft_layer(torch.nn.Linear(96, 64).to(dtype).requires_grad_(False), rank=16)
    hidden = torch.randn(130, 96, generator=seeded(0)).to(dtype).requires_grad_()
    lora = (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
    leaves = [hidden, *lora[:2]]
    base = layer.base_layer
    ours = outputs_and_grads((lora_linear(hidden, base.weight, lora, biases=base.bias),), leaves)
    close(ours, outputs_and_grads((layer(hidden),), leaves), rounding)


# ---- around the call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "weight"), [(BF16, FP32), (FP32, BF16), (FP32, FP32)], ids=str)
def test_autocast(hidden: torch.dtype, weight: torch.dtype) -> None:
    """Outputs in its dtype, as F.linear's; gradients in that of their tensor."""
    case = make(FP32)
    case = case._replace(
        hidden=case.hidden.detach().to(hidden).requires_grad_(),
        weights=[tensor.detach().to(weight).requires_grad_() for tensor in case.weights],
    )
    with torch.autocast(torch.get_default_device().type, BF16):
        outputs = case.run()
        assert F.linear(case.hidden, case.weights[0]).dtype == BF16
    ours = outputs_and_grads(outputs, case.leaves())
    assert all(output.dtype == BF16 for output in outputs)
    for mine, leaf in zip(ours[len(OUTPUTS) :], case.leaves(), strict=True):
        assert mine.dtype == leaf.dtype
    close(ours, exact(case), 2e-2)


def test_the_backward_does_not_see_an_autocast() -> None:
    case = make(FP32)
    plain = outputs_and_grads(case.run(), case.leaves())
    outputs = case.run()
    with torch.autocast(torch.get_default_device().type, BF16):
        inside = outputs_and_grads(outputs, case.leaves())
    assert all(torch.equal(mine, true) for mine, true in zip(inside, plain, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_compiled(dropout: float, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    case = make(dtype)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    call = {"biases": case.biases, "rows": case.rows, "dropout": dropout}
    outputs = compiled(case.hidden, case.weights, case.loras, **call)
    if dropout:
        assert [output.shape for output in outputs] == [(37, size) for size in OUTPUTS]
        return
    ours = outputs_and_grads(outputs, case.leaves())
    close(ours, outputs_and_grads(case.run(), case.leaves()), 1e-6 if dtype == FP32 else 2e-2)


def test_torch_func(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transforms the reference: gradients, a gradient a sample, and a right second derivative."""
    case = make(FP64).mapped(lambda tensor: tensor.detach())

    def loss(hidden: Tensor) -> Tensor:
        return torch.stack([output.sin().sum() for output in case._replace(hidden=hidden).run()]).sum()

    def plain(hidden: Tensor) -> Tensor:
        return torch.stack([output.sin().sum() for output in formula(case._replace(hidden=hidden))]).sum()

    with use_backend("torch"):
        for transform in (
            torch.func.grad,
            lambda function: torch.func.grad(lambda x: torch.func.grad(function)(x).square().sum()),
        ):
            torch.testing.assert_close(transform(loss)(case.hidden), transform(plain)(case.hidden))
        stacked = torch.stack([case.hidden, 2 * case.hidden])
        mapped = torch.vmap(torch.func.grad(loss))(stacked)
        torch.testing.assert_close(mapped[1], torch.func.grad(plain)(stacked[1]))


def test_a_second_derivative_is_right_or_refused(backend: str) -> None:
    case = make(FP32)
    (grad,) = torch.autograd.grad(sum(o.square().sum() for o in case.run()), case.hidden, create_graph=True)
    if backend != "torch":
        with pytest.raises(RuntimeError, match="rlhf_fast.lora_linear has no second derivative"):
            grad.square().sum().backward()
        return
    (true,) = torch.autograd.grad(sum(o.square().sum() for o in formula(case)), case.hidden, create_graph=True)
    ours, theirs = (torch.autograd.grad(each.square().sum(), case.leaves()[0])[0] for each in (grad, true))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


def test_no_values() -> None:
    """Device meta, and the tensors of a tracer."""
    case = make(BF16)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        assert [output.shape for output in make(BF16).run()] == [(37, size) for size in OUTPUTS]
    meta = case.mapped(lambda tensor: tensor.detach().to("meta").requires_grad_())
    with use_backend("torch"):
        outputs = meta.run()
    assert all(output.is_meta and output.dtype == BF16 for output in outputs)
    grads = torch.autograd.grad(sum(output.sum() for output in outputs), meta.leaves())
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in meta.leaves()]


def test_a_subclass() -> None:
    case = make(FP32).mapped(lambda tensor: tensor.detach())
    expected = case.run()
    both = case._replace(hidden=TwoTensor(case.hidden, case.hidden.clone()))
    for output, true in zip(both.run(), expected, strict=True):
        torch.testing.assert_close(output.a, true)
        torch.testing.assert_close(output.b, true)


@pytest.fixture
def mesh() -> Iterator[Any]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_tensor_spread_over_ranks_is_refused(mesh: Any) -> None:
    case = make(FP32).mapped(lambda tensor: tensor.detach())
    spread = distribute_tensor(case.hidden.cpu(), mesh)
    with pytest.raises(TypeError, match="lora_linear: hidden must be a whole tensor; got a DTensor"):
        case._replace(hidden=spread).run()
    with pytest.raises(TypeError, match=r"lora_linear: weights\[0\] must be a whole tensor; got a DTensor"):
        case._replace(weights=[distribute_tensor(case.weights[0].cpu(), mesh), *case.weights[1:]]).run()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"hidden": torch.zeros(37, INPUT).long()}, TypeError, "hidden must be float64"),
        ({"hidden": torch.zeros(37, 5)}, ValueError, r"weights\[0\] must have shape \(O, 5\)"),
        ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must have shape"),
        ({"weights": []}, TypeError, "weights must be a tensor"),
        ({"weights": [torch.zeros(3, INPUT, dtype=BF16)] * 3}, TypeError, r"weights\[0\] must be torch.float32 like"),
        ({"weights": [torch.zeros(3, INPUT, device="meta")] * 3}, ValueError, "on one device"),
        ({"biases": [None]}, ValueError, "biases must have one entry for each of the 3 weights; got 1"),
        ({"biases": [torch.zeros(4)] * 3}, ValueError, r"biases\[0\] must have shape \(12,\)"),
        ({"rows": [30, 8]}, ValueError, r"rows must be numbers >= 0 whose sum is 37.*got \[30, 8\]"),
        ({"rows": [38, -1]}, ValueError, "rows must be numbers >= 0"),
        ({"rows": [37]}, ValueError, "loras must have one entry for each of the 1 rows; got 2"),
        ({"loras": [[None] * 3, [None]]}, ValueError, "loras must have one entry for each of the 3 weights; got 1"),
        ({"loras": [[None] * 3, [1, None, None]]}, TypeError, r"lora must be a tuple \(A, B, scale\)"),
        (
            {"loras": [[None] * 3, [(torch.zeros(2, INPUT), torch.zeros(12, 3), 1.0), None, None]]},
            ValueError,
            r"lora B must have shape \(12, 2\)",
        ),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^lora_linear: .*{message}"):
        make(FP32)._replace(**change).run()


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan")])
def test_wrong_dropout(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"lora_linear: dropout must be in \[0, 1\)"):
        make(FP32).run(dropout=dropout)
