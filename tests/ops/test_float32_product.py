"""The engine's float32 product, on every path of this processor, whether it is the one chosen here or not."""

import pytest
import torch
from torch import Tensor, nn

from rlhf_fast import lora_layers
from rlhf_fast.ops import _native, _products
from rlhf_fast.ops._products import add_product_, linear, logits_product, matmul, summed_over_rows

pytestmark = pytest.mark.usefixtures("cpu_path")

# (rows, columns, inner): none, one, a rest before and after whole vectors, tiles and blocks of inner indices, primes,
# and enough for several tasks
SIZES = [
    (0, 5, 3), (5, 0, 3), (5, 3, 0), (1, 1, 1), (1, 48, 16), (2, 47, 15), (3, 49, 17), (7, 13, 11), (8, 96, 384),
    (9, 97, 385), (17, 289, 769), (31, 16, 383), (64, 577, 97), (601, 331, 67), (3, 7, 20011),
]  # fmt: skip
LAYOUTS = ["contiguous", "transposed", "inside wider rows", "every other column", "expanded"]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "multiplies_float32", lambda: True)


def random(*shape: int, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Gaussian, with NaN in the memory around it."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    rows, columns = shape
    wide = torch.full((rows, 2 * columns + 5), torch.nan)
    laid = {
        "contiguous": lambda: torch.empty(shape),
        "transposed": lambda: torch.empty(columns, rows).T,
        "inside wider rows": lambda: wide[:, 3 : 3 + columns],
        "every other column": lambda: wide[:, : 2 * columns : 2],
        "expanded": lambda: values[:1].expand(shape),
    }[layout]()
    return laid if layout == "expanded" else laid.copy_(values)


def near(ours: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, before: Tensor | None = None) -> None:
    """Within a few roundings of the sum of the magnitudes, far fewer than there are inner indices."""
    truth = scale * (left.double() @ right.double())
    magnitude = abs(scale) * (left.double().abs() @ right.double().abs())
    if before is not None:
        truth, magnitude = truth + before.double(), magnitude + before.double().abs()
    assert ((ours.double() - truth).abs() <= 1e-6 * magnitude + 1e-30).all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float64_truth(sizes: tuple[int, int, int]) -> None:
    rows, columns, inner = sizes
    left, right = random(rows, inner), random(inner, columns, layout="transposed", seed=1)
    near(matmul(left, right), left, right)
    near(matmul(left, right.contiguous()), left, right)
    near(summed_over_rows(left.T.contiguous(), right), left, right)


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_strides(left: str, right: str) -> None:
    """No element beside a factor's own is read, and none is written beside the result's own."""
    a, b = random(21, 35, layout=left), random(35, 61, layout=right, seed=1)
    room = torch.full((21, 70), 7.0)
    out = room[:, 4:65]
    logits_product(a, b.T, out)
    near(out, a, b)
    assert torch.equal(out, matmul(a.contiguous(), b.contiguous()))
    assert (room[:, :4] == 7).all() and (room[:, 65:] == 7).all()


@pytest.mark.parametrize("columns", [13, 48, 100])
def test_it_adds_to_what_is_there(columns: int) -> None:
    left, right, before = random(9, 400), random(400, columns, seed=1), random(9, columns, seed=2)
    sums = before.clone()
    add_product_(sums, left, right, -0.3)
    near(sums, left, right, -0.3, before)
    bias = random(1, columns, seed=3)[0]
    near(linear(left, right.T, bias), left, right, before=bias.expand(9, -1))


def test_it_writes_over_nan() -> None:
    out = torch.full((5, 50), torch.nan)
    logits_product(random(5, 3), random(50, 3, seed=1), out)
    assert not out.isnan().any()
    assert torch.equal(matmul(torch.ones(3, 0), torch.ones(0, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(special: float) -> None:
    left, right = random(20, 400), random(400, 70, seed=1)
    left[13, 390] = special
    right[390, 0], right[390, 1] = 0.0, -1.0
    ours = matmul(left, right)
    assert ours[13, 0].isnan()  # inf * 0
    torch.testing.assert_close(ours[13, 1], torch.tensor(-special), equal_nan=True)
    rest = [row for row in range(20) if row != 13]
    near(ours[rest], left[rest], right)


@pytest.mark.parametrize("sizes", [(300, 200, 700), (5, 1000, 100), (3000, 40, 30)], ids=str)
def test_any_number_of_threads(sizes: tuple[int, int, int]) -> None:
    rows, columns, inner = sizes
    left, right = random(rows, inner), random(inner, columns, seed=1)
    torch.set_num_threads(1)
    alone = matmul(left, right)
    for threads in (2, 3, 4, 16):
        torch.set_num_threads(threads)
        assert torch.equal(matmul(left, right), alone)


def test_a_row_is_the_same_wherever_it_stands() -> None:
    """Nor does an element depend on how many columns there are."""
    left, right = random(70, 401), random(401, 150, seed=1)
    whole = matmul(left, right)
    for start, stop in [(0, 1), (5, 6), (13, 30), (69, 70)]:
        assert torch.equal(matmul(left[start:stop], right), whole[start:stop])
    assert torch.equal(matmul(left, right[:, 7:60]), whole[:, 7:60])
    sums, parts = torch.ones_like(whole), torch.ones_like(whole)
    add_product_(sums, left, right, 0.7)
    for part in (slice(0, 7), slice(7, 60), slice(60, 150)):
        add_product_(parts[:, part], left, right[:, part], 0.7)
    assert torch.equal(sums, parts)


def test_offsets_past_two_to_the_31() -> None:
    """Rows 2^30 elements apart, in memory that is reserved and hardly touched."""
    left, right = random(4, 20), random(20, 50, seed=1)
    far = torch.empty(3 * 2**30 + 20).as_strided((4, 20), (2**30, 1)).copy_(left)
    assert torch.equal(matmul(far, right), matmul(left, right))


def test_compiled_and_faked() -> None:
    left, right = random(6, 40), random(40, 50, seed=1)
    compiled = torch.compile(lambda a, b: matmul(a, b) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(left, right), matmul(left, right) + 1)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = matmul(mode.from_tensor(left), mode.from_tensor(right))
    assert faked.shape == (6, 50)
    with torch.inference_mode():
        assert torch.equal(matmul(left.clone(), right), matmul(left, right))


def test_the_rule(cpu_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's maker decides, and build_info tells."""
    monkeypatch.undo()
    with open("/proc/cpuinfo") as file:
        expected = "AuthenticAMD" in file.read()
    assert _native.multiplies_float32() is expected
    assert _native.build_info()["float32_products"] == ("rlhf-fast" if expected else "torch")
    assert _products._own_float32(torch.ones(1)) is expected
    assert not _products._own_float32(torch.ones(1).double()) and not _products._own_float32(torch.ones(1).bfloat16())


def test_layers_without_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are exchanged where the product is chosen, in float32 alone, and give what they gave."""
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 9, bias=False), nn.Linear(9, 9).bfloat16())
    hidden = random(6, 40).requires_grad_()
    expected = model[:2](hidden)
    (slope,) = torch.autograd.grad(expected.sum(), hidden)
    monkeypatch.setattr(lora_layers, "build_info", lambda: {"float32_products": "torch"})
    lora_layers.exchange_plain(model)
    assert type(model[0]) is nn.Linear
    monkeypatch.setattr(lora_layers, "build_info", lambda: {"float32_products": "rlhf-fast"})
    lora_layers.exchange_plain(model)
    assert [type(layer) for layer in model] == [lora_layers.PlainLinear, lora_layers.PlainLinear, nn.Linear]
    ours = model[:2](hidden)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), hidden)[0], slope)
    with torch.no_grad():
        torch.testing.assert_close(model[:2](hidden), expected)
