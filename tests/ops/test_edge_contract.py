"""The edge contract, one table: every case here runs for every op of op_table.py on every backend.

Accuracy is tested in test_accuracy.py.
"""

import itertools

import pytest
import torch
from devices import device_of, interpreted
from op_table import OPS, Case, Op, make, outputs_and_grads

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
row_wise_op = pytest.mark.parametrize("op", [op for op in OPS if op.row_wise], ids=lambda op: op.name)
masked_op = pytest.mark.parametrize(
    "op", [op for op in OPS if op.name != "linear_cross_entropy"], ids=lambda op: op.name
)  # whose mask is its labels
target_op = pytest.mark.parametrize("op", [op for op in OPS if op.has_targets], ids=lambda op: op.name)
pytestmark = pytest.mark.usefixtures("backend")


def same(left: Case, right: Case, op: Op, rtol: float = 0.0) -> None:
    """Both cases give the same outputs and gradients, to the bit unless ``rtol`` is given."""
    left_outputs, left_grads = outputs_and_grads(op.run, op, left, left.mask)
    right_outputs, right_grads = outputs_and_grads(op.run, op, right, right.mask)
    for ours, theirs in zip(left_outputs, right_outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    for name in op.grads:
        torch.testing.assert_close(left_grads[name], right_grads[name], rtol=rtol, atol=rtol)


@every_op
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_masked_data_is_never_read(op: Op, poison: float, dtype: torch.dtype) -> None:
    case = make(op, dtype=dtype)
    dead = ~case.mask
    poisoned = Case(dict(case.x), case.targets.masked_fill(dead, 10**6), case.mask)
    for name in op.data:
        poisoned.x[name] = case.x[name].clone()
        poisoned.x[name][dead] = poison
    same(case, poisoned, op)

    outputs, grads = outputs_and_grads(op.run, op, poisoned, poisoned.mask)
    for output in outputs:
        if op.per_token:
            assert (output[dead] == 0).all()
    for name in op.grads:
        assert grads[name].isfinite().all()
        if name in op.data:
            assert (grads[name][dead] == 0).all()


@every_op
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 5), (3, 0), (0, 0)], ids=str)
def test_nothing_live(op: Op, shape: tuple[int, int]) -> None:
    case = make(op, shape, torch.float32)
    for tensor in case.x.values():
        tensor.fill_(torch.nan) if tensor.shape[:2] == shape else None
    nothing = torch.zeros(shape, dtype=torch.bool)
    outputs, grads = outputs_and_grads(op.run, op, case, nothing)
    for output in outputs:
        assert output.shape == (shape if op.per_token else ())
        assert (output == 0).all()
    for name in op.grads:
        assert grads[name].shape == case.x[name].shape
        assert (grads[name] == 0).all()


@every_op
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty_without_a_mask(op: Op, shape: tuple[int, int]) -> None:
    outputs, grads = outputs_and_grads(op.run, op, make(op, shape), None)
    for output in outputs:
        assert output.shape == (shape if op.per_token else ())
        assert (output == 0).all()
    for name in op.grads:
        assert (grads[name] == 0).all()


@every_op
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_live_nan_shows(op: Op, poison: float) -> None:
    """In its row alone for row-wise ops and ops with a head; in the loss for those that reduce."""
    if poison == float("inf") and not op.has_targets and op.name != "exact_kl":
        poison = float("nan")  # an infinite reward or log-prob has its own meaning, tested with its op
    case = make(op)
    first = next(iter(op.data))
    clean = op.run(case.x, case.targets, case.mask)
    case.x[first][0, 0] = poison
    outputs = op.run(case.x, case.targets, case.mask)
    if not op.per_token:
        assert outputs[0].isnan()
        return
    assert outputs[0][0, 0].isnan()
    if op.name != "masked_whiten":  # whose mean is that of all rows
        assert torch.equal(outputs[0][1:], clean[0][1:])


@every_op
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8], ids=str)
def test_mask_dtypes_and_leading_shapes(op: Op, dtype: torch.dtype) -> None:
    case = make(op)
    same(case, Case(case.x, case.targets, case.mask.to(dtype)), op)


@masked_op
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(0.5, torch.float32), (2, torch.int64), (-1, torch.int8), (2, torch.float16), (torch.nan, torch.bfloat16),
     (torch.inf, torch.float64), (2.0**-40, torch.float32), (255, torch.uint8)],
    ids=str,
)  # fmt: skip
def test_a_mask_takes_no_weights(op: Op, value: float, dtype: torch.dtype, backend: str) -> None:
    """An error on the CPU, with the first of them; on a GPU, where asking would synchronise, they count as 1."""
    case = make(op)
    mask = case.mask.to(dtype)
    mask[1, 2:4] = value
    if device_of(backend) == "cuda":
        same(Case(case.x, case.targets, mask), Case(case.x, case.targets, mask != 0), op)
        return
    with pytest.raises(ValueError, match=rf"^{op.name}: mask must be bool or 0/1; got {value:g} at position \(1, 2\)"):
        op.run(case.x, case.targets, mask)


@every_op
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32, torch.float16), (torch.float32, torch.float64)])
def test_mixed_dtypes(op: Op, dtypes: tuple[torch.dtype, ...]) -> None:
    """Tokens of several dtypes meet as in torch; each gradient has its own. (Hidden states and weight are of one.)"""
    case = make(op)
    tokens = [name for name in op.data if "hidden" not in name]
    case.x |= {name: case.x[name].to(dtype) for name, dtype in zip(tokens, itertools.cycle(dtypes))}
    case.x |= {name: case.x[name].bfloat16() for name in op.shared if name in ("bias", "A")}
    outputs, grads = outputs_and_grads(op.run, op, case, case.mask)
    exact = Case({name: tensor.double() for name, tensor in case.x.items()}, case.targets, case.mask)
    true_outputs, true_grads = outputs_and_grads(op.naive, op, exact, case.mask)
    wide = torch.float64 in [case.x[name].dtype for name in tokens] and not op.shared
    for ours, true in zip(outputs, true_outputs, strict=True):
        assert ours.dtype == (torch.float64 if wide else torch.float32)
        torch.testing.assert_close(ours.double(), true, rtol=2e-5, atol=2e-5)
    for name in op.grads:
        assert grads[name].dtype == case.x[name].dtype
        if name not in op.constants:
            torch.testing.assert_close(grads[name].double(), true_grads[name], rtol=1e-2, atol=1e-3)


@every_op
@pytest.mark.parametrize(
    "layout", ["transposed", "sliced", "strided", "as_strided", "expanded", "one_value", "reversed_features"]
)
def test_layouts(op: Op, layout: str) -> None:
    """Other strides, same values; and the same bits, but where a matrix product may sum in another order."""

    def relaid(tensor: torch.Tensor, shared: bool = False) -> torch.Tensor:
        if layout == "transposed":
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "sliced":
            wide = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 3, *tensor.shape[2:]), 99).to(tensor.dtype)
            wide[1:-1, 2:-1] = tensor
            return wide[1:-1, 2:-1]
        if layout == "strided":
            return tensor.repeat_interleave(2, dim=1)[:, ::2]
        if layout == "as_strided":
            memory = torch.full((3 * tensor.numel() + 2,), 99).to(tensor.dtype)
            return memory.as_strided(tensor.shape, [3 * stride for stride in tensor.stride()], 2).copy_(tensor)
        if layout == "one_value":
            return tensor.flatten()[0].expand_as(tensor)
        if layout == "expanded":
            return tensor[:1].expand_as(tensor)
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    case = make(op)
    other = Case(dict(case.x), relaid(case.targets), relaid(case.mask))
    for name, tensor in case.x.items():
        if tensor.dim() > 1:
            other.x[name] = relaid(tensor)
            assert not other.x[name].is_contiguous() or layout in ("expanded",)
    plain = Case({name: tensor.contiguous() for name, tensor in other.x.items()}, other.targets, other.mask)
    same(plain, other, op, rtol=1e-5 if op.shared else 0.0)


@every_op
def test_any_thread_count_and_run_to_run(op: Op, backend: str) -> None:
    """Long enough (> 32768 live tokens) for torch to split a reduction over threads, and for several tiles anywhere."""
    shape = (240, 250) if op.name != "gae" else (3000, 20)
    if interpreted(backend):
        shape = (2, 4) if op.has_vocabulary else (3, 1500)
    case = make(op, shape, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(outputs_and_grads(op.run, op, case, case.mask))
    finally:
        torch.set_num_threads(threads)
    (outputs, grads), (again, grads_again) = results
    for ours, theirs in zip(outputs, again, strict=True):
        assert torch.equal(ours, theirs)
    for name in op.grads:
        assert torch.equal(grads[name], grads_again[name]), name


@row_wise_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_wherever_it_stands(op: Op, dtype: torch.dtype, backend: str) -> None:
    """Each row alone, and slices that put rows at other places of a vector register, against the whole batch."""
    tokens = 9 if interpreted(backend) else 131
    whole = make(op, (1, tokens), dtype)

    def run(start: int, stop: int) -> list[torch.Tensor]:
        x = {name: tensor[:, start:stop].clone() for name, tensor in whole.x.items()}
        leaves = [x[name].requires_grad_() for name in op.grads]
        outputs = op.run(x, whole.targets[:, start:stop], None)
        return [*outputs, *torch.autograd.grad(torch.stack(outputs).sum(), leaves)]

    batch = run(0, tokens)
    for start, stop in [*((row, row + 1) for row in range(tokens)), (1, tokens), (3, tokens // 6), (5, tokens // 2)]:
        for part, all_rows in zip(run(start, stop), batch, strict=True):
            assert torch.equal(part, all_rows[:, start:stop])


@every_op
def test_nothing_is_kept_without_a_gradient(op: Op) -> None:
    case = make(op)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frozen = op.run(case.x, case.targets, case.mask)
        with torch.no_grad():
            grown = {name: tensor.clone().requires_grad_() for name, tensor in case.x.items()}
            unrecorded = op.run(grown, case.targets, case.mask)
    assert not kept
    assert not any(output.requires_grad for output in (*frozen, *unrecorded))


@target_op
def test_ignore_index_is_a_mask(op: Op) -> None:
    case = make(op)
    ignored = Case(case.x, case.targets.masked_fill(~case.mask, -100), torch.ones_like(case.mask))
    same(case, ignored, op)


@target_op
@pytest.mark.parametrize("wrong", [7, -1, 2**40])
def test_target_out_of_range(op: Op, wrong: int, backend: str) -> None:
    """An error on the CPU; on a GPU, where it would have to wait for the data, NaN in that row."""
    case = make(op)
    case.mask[1, 2] = True
    case.targets[1, 2] = wrong
    if device_of(backend) == "cuda":
        first = op.run(case.x, case.targets, case.mask)[0]
        assert first.isnan().sum() == 1 and (not op.per_token or first[1, 2].isnan())
    else:
        with pytest.raises(IndexError, match=rf"{op.name}: .*\[0, 7\); got {wrong} at position \(1, 2\)"):
            op.run(case.x, case.targets, case.mask)
    case.mask[1, 2] = False
    assert all(output.isfinite().all() for output in op.run(case.x, case.targets, case.mask))


@target_op
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint64], ids=str)
def test_target_dtypes(op: Op, dtype: torch.dtype) -> None:
    case = make(op)
    same(case, Case(case.x, case.targets.to(dtype), case.mask), op)


@target_op
def test_ignore_index_does_not_wrap_round_to_a_token(op: Op) -> None:
    """-100 as uint8 is 156, which is a token id like another."""
    case = make(op, (1, 2), vocab=160)
    case.targets.fill_(156)
    everything = torch.ones_like(case.mask)
    same(Case(case.x, case.targets, everything), Case(case.x, case.targets.to(torch.uint8), everything), op)
    outputs = op.run(case.x, case.targets.to(torch.uint8), None)
    assert (outputs[0] != 0).all()


@every_op
def test_wrong_inputs_are_named(op: Op) -> None:
    case = make(op)

    def fails(kind: type[Exception], name: str, x: dict[str, object]) -> None:
        with pytest.raises(kind, match=rf"^{op.name}: .*\b{name}\b"):
            op.run(case.x | x, case.targets, case.mask)  # type: ignore[arg-type]

    first, *rest = op.data
    for name in op.data:
        fails(TypeError, name, {name: case.x[name].long()})
        fails(TypeError, name, {name: case.x[name].tolist()})
    for name in [*rest, *op.shared]:
        label = {"A": "lora A", "B": "lora B"}.get(name, name)
        fails(ValueError, label, {name: case.x[name][..., :-1]})
        fails(ValueError, label, {name: case.x[name].to("meta")})
    if op.name == "linear_cross_entropy":
        return  # its mask is its labels
    for mask in (case.mask[:, :-1], case.mask.unsqueeze(-1), case.mask.to("meta")):
        with pytest.raises(ValueError, match=rf"^{op.name}: .*mask"):
            op.run(case.x, case.targets, mask)
    with pytest.raises(TypeError, match=rf"^{op.name}: mask"):
        op.run(case.x, case.targets, case.mask.tolist())  # type: ignore[arg-type]


@target_op
def test_wrong_targets_are_named(op: Op) -> None:
    case = make(op)
    name = "labels" if op.name == "linear_cross_entropy" else "targets"
    for kind, targets in [
        (TypeError, case.targets.double()),
        (ValueError, case.targets[:, :-1]),
        (ValueError, case.targets.to("meta")),
    ]:
        with pytest.raises(kind, match=rf"^{op.name}: .*\b{name}\b"):
            op.run(case.x, targets, None)
