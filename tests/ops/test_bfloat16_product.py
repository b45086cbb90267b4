"""The engine's bfloat16 product, on processors that have its instructions, whether it is the one chosen here or not."""

import pytest
import torch
from torch import Tensor

from rlhf_fast.ops import _native, _products, use_backend
from rlhf_fast.ops._native import Term
from rlhf_fast.ops._packed import PackedWeight
from rlhf_fast.ops._products import linear, logits_product, matmul, product, sum_of_products

pytestmark = pytest.mark.skipif(
    _native.native.reason is not None or not _native.multiplies_bfloat16(), reason="needs AVX-512 BF16"
)

# (rows, columns, inner): none, one, rests of vectors, tiles and pairs, primes, more than is packed at a time
SIZES = [
    (0, 5, 3), (5, 0, 3), (5, 3, 0), (1, 1, 1), (1, 48, 16), (2, 47, 15), (3, 49, 17), (8, 96, 64), (9, 97, 385),
    (17, 289, 33), (601, 67, 331), (5, 50, 9001),
]  # fmt: skip
LAYOUTS = ["contiguous", "transposed", "inside wider rows", "every other column"]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "prefers_bfloat16", lambda: True)


def random(*shape: int, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Gaussian, with NaN in the memory around it."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    rows, columns = shape
    wide = torch.full((rows, 2 * columns + 5), torch.nan, dtype=torch.bfloat16)
    laid = {
        "contiguous": lambda: torch.empty_like(values),
        "transposed": lambda: torch.empty(columns, rows, dtype=torch.bfloat16).T,
        "inside wider rows": lambda: wide[:, 3 : 3 + columns],
        "every other column": lambda: wide[:, : 2 * columns : 2],
    }[layout]()
    return laid.copy_(values)


def near(ours: Tensor, terms: list[Term], bias: Tensor | None = None) -> None:
    """Within the roundings of a float32 sum of the magnitudes, and one rounding to bfloat16."""
    truth, magnitude = (torch.zeros(ours.shape, dtype=torch.float64) for _ in range(2))
    if bias is not None:
        truth, magnitude = truth + bias.double(), magnitude + bias.double().abs()
    for left, right, start, scale, _ in terms:
        rows = slice(start, start + left.shape[0])
        truth[rows] += scale * (left.double() @ right.double())
        magnitude[rows] += abs(scale) * (left.double().abs() @ right.double().abs())
    once = 0 if ours.dtype == torch.float32 else 2**-8
    assert ((ours.double() - truth).abs() <= 1e-6 * magnitude + once * truth.abs() + 1e-30).all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float64_truth(sizes: tuple[int, int, int]) -> None:
    rows, columns, inner = sizes
    left = random(rows, inner)
    for layout in LAYOUTS:
        right = random(inner, columns, layout=layout, seed=1)
        near(matmul(left, right), [Term(left, right)])
        near(product(left, right), [Term(left, right)])
        assert product(left, right).dtype == torch.float32
        assert torch.equal(PackedWeight(right.T).linear(left, None), matmul(left, right))


@pytest.mark.parametrize("left", LAYOUTS)
def test_no_memory_beside_a_factor_is_used(left: str) -> None:
    a, b = random(21, 35, layout=left), random(35, 61, layout="inside wider rows", seed=1)
    room = torch.full((21, 70), 7.0)
    out = room[:, 4:65]
    logits_product(a, b.T, out)
    near(out, [Term(a, b)])
    assert (room[:, :4] == 7).all() and (room[:, 65:] == 7).all()


@pytest.mark.parametrize("inner", [40, 3000])
def test_terms_of_some_rows_with_scales_and_a_bias(inner: int) -> None:
    """As of a layer and the adapters of two roles; rows 9 to 12 have none. A chunk of packed pairs ends in a term."""
    left, right, bias = random(29, inner), random(inner, 61, seed=1), random(1, 61, seed=2)[0]
    terms = [
        Term(random(9, 16, seed=3), random(16, 61, layout="transposed", seed=4), 0, 0.3),
        Term(random(16, 8, seed=5), random(8, 61, seed=6), 13, -2.0),
        Term(random(29, 2000, seed=7), random(2000, 61, seed=8)),
        Term(left, right),
    ]
    near(sum_of_products(terms, bias), terms, bias)
    zero = [terms[0]._replace(scale=0.0), terms[3]]
    near(sum_of_products(zero), zero)
    near(linear(left, right.T, bias), terms[3:], bias)


def test_a_forced_torch_backend_is_obeyed_in_sampling_too() -> None:
    weight = random(61, 64)
    assert PackedWeight(weight)._by_engine is not None
    with use_backend("torch"):
        assert PackedWeight(weight)._by_engine is None


def test_torch_gives_the_same_where_the_engine_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = [Term(random(5, 16), random(16, 61, seed=1), 2, 0.5), Term(random(9, 64, seed=2), random(64, 61, seed=3))]
    ours = sum_of_products(terms)
    monkeypatch.setattr(_native, "prefers_bfloat16", lambda: False)
    torch.testing.assert_close(sum_of_products(terms), ours, rtol=2**-6, atol=0.1)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(special: float) -> None:
    left, right = random(20, 41), random(41, 70, seed=1)
    left[13, 40] = special
    ours = matmul(left, right)
    assert not ours[13].isfinite().any()
    rest = [row for row in range(20) if row != 13]
    near(ours[rest], [Term(left[rest], right)])


@pytest.mark.parametrize("sizes", [(300, 200, 700), (5, 1000, 100), (3000, 40, 30)], ids=str)
def test_any_number_of_threads_and_any_place(sizes: tuple[int, int, int]) -> None:
    rows, columns, inner = sizes
    left, right = random(rows, inner), random(inner, columns, seed=1)
    torch.set_num_threads(1)
    alone = matmul(left, right)
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        assert torch.equal(matmul(left, right), alone)
    assert torch.equal(matmul(left[2:4], right), alone[2:4])
    assert torch.equal(matmul(left, right[:, 7:39]), alone[:, 7:39])


def test_compiled_and_faked() -> None:
    left, right, bias = random(6, 40), random(50, 40, seed=1), random(1, 50, seed=2)[0]
    compiled = torch.compile(lambda *given: linear(*given) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(left, right, bias), linear(left, right, bias) + 1)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = linear(*map(mode.from_tensor, (left, right, bias)))
    assert faked.shape == (6, 50) and faked.dtype == torch.bfloat16


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's maker decides, and build_info tells."""
    monkeypatch.undo()
    with open("/proc/cpuinfo") as file:
        amd = "AuthenticAMD" in file.read()
    assert _native.prefers_bfloat16() is amd
    assert _native.build_info()["bfloat16_products"] == ("rlhf-fast" if amd else "torch")
    assert _products._own_bfloat16(torch.ones(1).bfloat16()) is amd
    assert not _products._own_bfloat16(torch.ones(1)) and not _products._own_bfloat16(torch.ones(1).half())
