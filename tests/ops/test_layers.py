"""The contract of the ops between a layer's matrix products, on every backend: rows in, rows out, in one dtype."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from devices import interpreted, seeded
from op_table import LAYER_OPS, LAYERS, WIDTH, Case, Op, make, outputs_and_grads
from torch import Tensor

from rlhf_fast import ops

every_op = pytest.mark.parametrize("op", LAYER_OPS, ids=lambda op: op.name)
every_layer = pytest.mark.parametrize("op", LAYERS, ids=range(len(LAYERS)))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
pytestmark = pytest.mark.usefixtures("backend")


def results(op: Op, case: Case) -> list[Tensor]:
    """The output and the gradients, of a weighting in the output's own dtype."""
    x = {name: tensor.detach().requires_grad_(name in op.grads) for name, tensor in case.x.items()}
    (output,) = op.run(x, case.targets, None)
    upstream = torch.randn(output.shape, generator=seeded(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, [x[name] for name in op.grads], upstream)]


def same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def wide(op: Op, width: int) -> Op:
    """With rows of another width."""
    return replace(
        op,
        data={name: tuple(width if size == WIDTH else size for size in sizes) for name, sizes in op.data.items()},
        shared={name: (width,) for name in op.shared},
    )


def near_the_truth(op: Op, case: Case, least: float = 0.0) -> None:
    """One rounding to the dtype, and float32 arithmetic before it, on numbers of at least the size ``least``.

    A gradient has a second rounding, of the upstream one, which is given in float64.
    """
    exact = Case({name: tensor.double() for name, tensor in case.x.items()}, case.targets, case.mask)
    truth, true_grads = outputs_and_grads(op.naive, op, exact, None)
    outputs, grads = outputs_and_grads(op.run, op, case, None)
    dtype = next(iter(case.x.values())).dtype
    rounding = torch.finfo(dtype).eps / 2
    pairs = [(outputs[0], truth[0], 1.01 * rounding * truth[0].abs())]
    pairs += [(grads[name], true_grads[name], 3 * rounding * true_grads[name].abs().max()) for name in op.grads]
    for mine, true, rounded in pairs:
        assert mine.dtype == dtype
        in_float32 = 2e-6 * true.abs().max().clamp(min=least) + torch.finfo(dtype).smallest_normal
        assert ((mine.double() - true).abs() <= rounded + in_float32).all()


@every_layer
def test_float64_is_the_plain_formula(op: Op) -> None:
    case = make(op, dtype=torch.float64)
    ours, our_grads = outputs_and_grads(op.run, op, case, None)
    truth, true_grads = outputs_and_grads(op.naive, op, case, None)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(our_grads, true_grads, rtol=1e-11, atol=1e-13)


@every_layer
@every_dtype
def test_float64_truth(op: Op, dtype: torch.dtype) -> None:
    near_the_truth(op, make(op, (5, 7), dtype))


@every_op
@every_dtype
@pytest.mark.parametrize("width", [1, 15, 17, 64, 1000, 2049])
def test_widths(op: Op, dtype: torch.dtype, width: int) -> None:
    """Below, at and past a vector, a thread's columns and a block's."""
    if op.name == "rotary_embedding" and width < 8:
        pytest.skip("a head is at least as wide as what is turned")
    # the gradient of a norm of one number is near 0, a difference of numbers near 1
    near_the_truth(wide(op, width), make(wide(op, width), (2, 2), dtype), least=1.0 if width == 1 else 0.0)


@every_layer
def test_large_and_small_numbers(op: Op) -> None:
    """No overflow on the way to a result that has none; the slopes of far numbers are 0 and 1."""
    for scale in (1e-12, 30.0, 100.0):
        case = make(op)
        first = next(iter(op.data))
        case.x[first] = case.x[first] * scale
        near_the_truth(op, case)


@every_op
@every_dtype
def test_shape_and_dtype_are_the_inputs(op: Op, dtype: torch.dtype) -> None:
    """Inside autocast too, where torch's own multiplication and activations leave them as well."""
    case = make(op, dtype=dtype)
    plain = results(op, case)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        inside = results(op, case)
    same_bits(inside, plain)
    assert plain[0].dtype == dtype and plain[0].shape == case.x[op.grads[0]].shape


@every_op
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(op: Op, shape: tuple[int, int]) -> None:
    case = make(op, shape)
    output, *grads = results(op, case)
    assert output.shape == case.x[op.grads[0]].shape
    for name, grad in zip(op.grads, grads, strict=True):
        assert grad.shape == case.x[name].shape and (grad == 0).all()


@every_op
def test_rows_of_nothing(op: Op) -> None:
    if op.name == "rotary_embedding":
        x, angles = torch.zeros(2, 3, 5, 4, requires_grad=True), torch.zeros(1, 5, 0)
        assert torch.equal(ops.rotary_embedding(x, angles, angles), x)  # nothing is turned
        return
    output, *grads = results(wide(op, 0), make(wide(op, 0)))
    assert output.shape == (3, 5, 0) and all(grad.numel() == 0 for grad in grads)


@every_op
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "expanded", "one_value", "reversed_features"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(op: Op, layout: str, dtype: torch.dtype) -> None:
    """Other strides, and addresses that are not aligned: the same bits."""

    def relaid(tensor: Tensor) -> Tensor:
        if layout == "transposed":
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "sliced":
            room = torch.full((tensor.shape[0] + 2, *(size + 3 for size in tensor.shape[1:])), torch.nan)
            inner = room.to(tensor.dtype)[1:-1]
            for dim in range(1, tensor.dim()):
                inner = inner.narrow(dim, 1, tensor.shape[dim])
            return inner.copy_(tensor)
        if layout == "strided":
            return tensor.repeat_interleave(2, dim=-1)[..., ::2]
        if layout == "expanded":
            return tensor[:1].expand_as(tensor)
        if layout == "one_value":
            return tensor.flatten()[0].expand_as(tensor)
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    case = make(op, dtype=dtype)
    other = Case(dict(case.x), case.targets, case.mask)
    for name in case.x:
        if name not in op.shared:
            other.x[name] = relaid(case.x[name])
            assert not other.x[name].is_contiguous()
    plain = Case({name: tensor.contiguous() for name, tensor in other.x.items()}, case.targets, case.mask)
    same_bits(results(op, other), results(op, plain))


@every_op
@every_dtype
def test_any_gradient_is_taken(op: Op, dtype: torch.dtype) -> None:
    """An upstream gradient of any strides: that of a sum has none at all."""
    case = make(op, dtype=dtype)

    def grads(upstream: Tensor) -> list[Tensor]:
        x = {name: tensor.detach().requires_grad_(name in op.grads) for name, tensor in case.x.items()}
        (output,) = op.run(x, case.targets, None)
        return list(torch.autograd.grad(output, [x[name] for name in op.grads], upstream))

    shape = case.x[op.grads[0]].shape
    upstream = torch.randn(shape, generator=seeded(1)).to(dtype)
    dims = list(reversed(range(upstream.dim())))
    same_bits(grads(upstream.permute(dims).contiguous().permute(dims)), grads(upstream))
    one = torch.ones((), dtype=dtype)
    same_bits(grads(one.expand(shape)), grads(one.expand(shape).contiguous()))


@every_layer
@every_dtype
def test_any_thread_count_and_run_to_run(op: Op, dtype: torch.dtype, backend: str) -> None:
    """As many rows as several parts of the weight's gradient have."""
    case = make(op, (2, 40) if interpreted(backend) else (40, 90), dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(op, case))
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        same_bits(again, found[0])


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_wherever_it_stands(op: Op, dtype: torch.dtype, backend: str) -> None:
    """Alone, beside others, and at any address. (torch's own vector and scalar loops differ in their last bits.)"""
    if backend == "torch":
        pytest.skip("the last bits of torch's activations depend on the place")
    case = make(op, (1, 9), dtype)
    whole = results(op, case)
    for start, stop in [*((row, row + 1) for row in range(9)), (1, 9), (3, 8)]:
        part = Case(
            {name: x if name in op.shared else x[:, start:stop] for name, x in case.x.items()}, case.targets, case.mask
        )
        torch.testing.assert_close(results(op, part)[0], whole[0][:, start:stop], rtol=0, atol=0)


@every_layer
@every_dtype
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_is_alone(op: Op, dtype: torch.dtype, poison: float) -> None:
    case = make(op, dtype=dtype)
    clean = results(op, case)
    first = next(iter(op.data))
    case.x[first] = case.x[first].clone()
    case.x[first][1, 2, ..., 4] = poison
    spoilt = results(op, case)
    others = torch.ones(case.x[first].shape[:2], dtype=torch.bool)
    others[1, 2] = False
    for name, mine, plain in zip(["output", *op.grads], spoilt, clean, strict=True):
        if name not in op.shared:
            assert torch.equal(mine[others], plain[others])
    if poison != poison:
        assert spoilt[0][1, 2].isnan().any()


@every_op
def test_nothing_is_kept_without_a_gradient(op: Op) -> None:
    kept = kept_for_backward(op, make(op), grads=())
    assert not kept


@every_op
def test_what_is_kept_for_the_backward(op: Op, backend: str) -> None:
    """The inputs, and one number a row of rms_norm."""
    if backend == "torch":
        pytest.skip("the reference keeps what autograd keeps")
    case = make(op, dtype=torch.bfloat16)
    inputs = {tensor.data_ptr() for tensor in case.x.values()}
    own = [x for x in kept_for_backward(op, case, op.grads) if x.data_ptr() not in inputs]
    expected = [(15,), (WIDTH,)] if op.name == "rms_norm" else []  # rows, and the weight in float32
    assert sorted(tuple(x.shape) for x in own) == expected


def kept_for_backward(op: Op, case: Case, grads: tuple[str, ...]) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = {name: tensor.requires_grad_(name in grads) for name, tensor in case.x.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        op.run(x, case.targets, None)
    return kept


@every_op
def test_one_gradient_without_the_other(op: Op) -> None:
    case = make(op)
    everything = dict(zip(op.grads, results(op, case)[1:], strict=True))
    for name in op.grads:
        (grad,) = results(replace(op, grads=(name,)), case)[1:]
        same_bits([grad], [everything[name]])


@every_op
def test_a_second_derivative_is_right_or_refused(op: Op, backend: str) -> None:
    case = make(op)
    x = {name: tensor.requires_grad_(name in op.grads) for name, tensor in case.x.items()}
    (output,) = op.run(x, case.targets, None)
    (grad,) = torch.autograd.grad(output.square().sum(), x[op.grads[0]], create_graph=True)
    if backend == "torch":
        grad.square().sum().backward()
        return
    with pytest.raises(RuntimeError, match=f"rlhf_fast.{op.name} has no second derivative"):
        grad.square().sum().backward()


@every_op
def test_wrong_inputs_are_named(op: Op) -> None:
    case = make(op)

    def fails(kind: type[Exception], name: str, x: dict[str, object]) -> None:
        with pytest.raises(kind, match=rf"^{op.name}: .*\b{name}\b"):
            op.run(case.x | x, case.targets, None)  # type: ignore[arg-type]

    first, *rest = case.x
    for name in case.x:
        fails(TypeError, name, {name: case.x[name].long()})
    for name in rest:
        fails(ValueError, name, {name: case.x[name][..., :-1]})
        fails(ValueError, name, {name: case.x[name].to("meta")})


# ---- the ops, one by one --------------------------------------------------------------------------------------------


def test_rms_norm_by_hand() -> None:
    hidden = torch.tensor([[3.0, 4.0]], requires_grad=True)  # mean square 12.5, and 1/4 added: 1 / 3.570714
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    normed = ops.rms_norm(hidden, weight, eps=0.25)
    scale = 12.75**-0.5
    torch.testing.assert_close(normed.detach(), torch.tensor([[3 * scale, 8 * scale]]))
    normed[0, 0].backward()  # d/dx_0 = scale - x_0^2 scale^3 / 2, d/dx_1 = -x_0 x_1 scale^3 / 2
    torch.testing.assert_close(hidden.grad, torch.tensor([[scale - 4.5 * scale**3, -6 * scale**3]]))
    torch.testing.assert_close(weight.grad, torch.tensor([3 * scale, 0.0]))


def test_rms_norm_without_a_weight_and_of_any_shape() -> None:
    x = torch.randn(2, 3, 4, generator=seeded(0))
    ones = torch.ones(4)
    assert torch.equal(ops.rms_norm(x, None, eps=1e-6), ops.rms_norm(x, ones, eps=1e-6))
    assert torch.equal(ops.rms_norm(x, ones - 1, eps=1e-6, offset=1.0), ops.rms_norm(x, ones, eps=1e-6))
    assert torch.equal(ops.rms_norm(x[0, 0], ones, eps=1e-6), ops.rms_norm(x, ones, eps=1e-6)[0, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_with_a_weight_of_another_dtype(dtype: torch.dtype) -> None:
    """It is taken in float32, and its gradient comes in its own dtype."""
    x, weight = torch.randn(6, 8, generator=seeded(0)), torch.randn(8, generator=seeded(1)).to(dtype)
    single = weight.float().requires_grad_()
    expected = ops.rms_norm(x, single, eps=1e-6)
    weight.requires_grad_()
    got = ops.rms_norm(x, weight, eps=1e-6)
    assert torch.equal(got, expected)
    (grad,), (true,) = (torch.autograd.grad(y.sum(), w) for y, w in ((got, weight), (expected, single)))
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, true.to(dtype))


def test_rms_norm_refuses_bad_numbers() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(3)
    for options in ({"eps": -1.0}, {"eps": torch.inf}):
        with pytest.raises(ValueError, match="^rms_norm: eps must be a finite number >= 0"):
            ops.rms_norm(x, weight, **options)
    with pytest.raises(ValueError, match="^rms_norm: offset is added to the weight; got offset=1.0 and no weight"):
        ops.rms_norm(x, None, eps=1e-6, offset=1.0)
    with pytest.raises(TypeError, match="^rms_norm: offset must be a number"):
        ops.rms_norm(x, weight, eps=1e-6, offset=torch.ones(()))
    with pytest.raises(ValueError, match=r"^rms_norm: hidden must have shape \(..., H\)"):
        ops.rms_norm(x[0, 0], None, eps=1e-6)


def test_halves_of_one_product() -> None:
    """gate and up as a fused projection gives them."""
    product = torch.randn(3, 5, 2 * WIDTH, generator=seeded(0)).bfloat16()
    gate, up = product.chunk(2, dim=-1)
    assert torch.equal(ops.gated_activation(gate, up), ops.gated_activation(gate.contiguous(), up.contiguous()))


@pytest.mark.parametrize(
    ("name", "function"),
    [("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")), ("relu", F.relu)],
    ids=("silu", "gelu", "gelu_tanh", "relu"),
)
def test_activations_are_torchs(name: str, function: object) -> None:
    far = torch.tensor([-0.0, 100.0, -100.0, 1e4, -1e4, 1e15, -1e15, 1e25, -1e25])
    x = torch.cat([torch.linspace(-30, 30, 241), far]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    ours, true = ops.gated_activation(x, torch.ones_like(x), activation=name), function(exact)  # type: ignore[operator]
    torch.testing.assert_close(ours.double(), true, rtol=2e-6, atol=1e-7)
    (grad,), (true_grad,) = (torch.autograd.grad(y.sum(), leaf) for y, leaf in ((ours, x), (true, exact)))
    torch.testing.assert_close(grad.double(), true_grad, rtol=2e-6, atol=1e-7)


def test_gated_activation_refuses_what_does_not_fit() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="gated_activation: activation must be one of silu, gelu_tanh, gelu, relu"):
        ops.gated_activation(x, x, activation="tanh")
    with pytest.raises(TypeError, match="gated_activation: up must be torch.float32 like gate; got torch.bfloat16"):
        ops.gated_activation(x, x.bfloat16())


def by_token(x: Tensor) -> Tensor:
    """The same numbers with the memory of (B, T, heads, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@pytest.mark.parametrize("angles", ["of each sequence", "shared", "expanded"])
@pytest.mark.parametrize(
    ("dtype", "of_angles"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
     (torch.float32, torch.float16)],
    ids=str,
)  # fmt: skip
def test_rotary_as_transformers_has_it(angles: str, dtype: torch.dtype, of_angles: torch.dtype) -> None:
    generator = seeded(0)
    x = torch.randn(2, 3, 5, 16, generator=generator).to(dtype).requires_grad_()
    cos, sin = torch.randn(2, 2, 5, 16, generator=generator).to(of_angles).unbind()
    if angles != "of each sequence":
        cos, sin = cos[:1], sin[:1]
    if angles == "expanded":
        cos, sin = cos.expand(2, 5, 16), sin.expand(2, 5, 16)
    exact = x.detach().double().requires_grad_()
    true = exact * cos.double().unsqueeze(1) + rotate_half(exact) * sin.double().unsqueeze(1)
    ours = ops.rotary_embedding(x, cos, sin)
    upstream = torch.randn(x.shape, generator=generator).to(dtype)
    (grad,), (true_grad,) = torch.autograd.grad(ours, x, upstream), torch.autograd.grad(true, exact, upstream.double())
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), true, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_keeps_the_layout(dtype: torch.dtype, backend: str) -> None:
    """Of the result and of the gradient, whatever the layout of the upstream one."""
    plain = torch.randn(2, 3, 5, 16, generator=seeded(0)).to(dtype)
    cos, sin = torch.randn(2, 1, 5, 16, generator=seeded(1)).unbind()
    expected = ops.rotary_embedding(plain, cos, sin)
    fused = torch.zeros(2, 5, 7, 16, dtype=dtype)[:, :, 2:5].transpose(1, 2)  # q beside k and v
    for x, strides in ((plain, plain.stride()), (by_token(plain), by_token(plain).stride()),
                       (fused.copy_(plain), by_token(plain).stride())):  # fmt: skip
        leaf = x.detach().requires_grad_()
        turned = ops.rotary_embedding(leaf, cos, sin)
        assert torch.equal(turned, expected) and turned.stride() == strides
        for upstream in (plain, by_token(plain)):
            (grad,) = torch.autograd.grad(turned, leaf, upstream, retain_graph=True)
            assert grad.stride() == strides or backend == "torch"


def test_rotary_back_and_forth() -> None:
    """The gradient turns the other way: turned twice, the numbers are as before."""
    angle = torch.rand(1, 5, 8, generator=seeded(0)).repeat(1, 1, 2)
    x = torch.randn(2, 3, 5, 16, generator=seeded(1)).requires_grad_()
    turned = ops.rotary_embedding(x, angle.cos(), angle.sin())
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    torch.testing.assert_close(back, x.detach(), rtol=1e-5, atol=1e-6)


def test_rotary_refuses_what_does_not_fit() -> None:
    x, angles = torch.zeros(2, 3, 5, 16), torch.zeros(2, 5, 16)
    for bad, match in (
        ((x[0], angles, angles), r"x must have shape \(B, heads, T, D\); got \(3, 5, 16\)"),
        ((x, angles[0], angles), r"cos must have shape \(2 or 1, 5, R\), by x; got \(5, 16\)"),
        ((x, angles[:, :4], angles), "cos must have shape"),
        ((x, angles[..., :7], angles[..., :7]), "cos must have an even number of columns, at most the 16"),
        ((x[..., :8], angles, angles), "cos must have an even number of columns, at most the 8"),
        ((x, angles, angles[:1]), r"sin must have shape \(2, 5, 16\)"),
    ):
        with pytest.raises(ValueError, match=f"^rotary_embedding: {match}"):
            ops.rotary_embedding(*bad)
    with pytest.raises(TypeError, match="^rotary_embedding: sin must be torch.float32 like cos"):
        ops.rotary_embedding(x, angles, angles.double())


def test_rotary_gives_the_angles_no_gradient() -> None:
    x = torch.zeros(1, 1, 2, 4, requires_grad=True)
    cos, sin = torch.ones(2, 1, 2, 4).unbind()
    ops.rotary_embedding(x, cos.requires_grad_(), sin.requires_grad_()).sum().backward()
    assert cos.grad is None and sin.grad is None and x.grad is not None
