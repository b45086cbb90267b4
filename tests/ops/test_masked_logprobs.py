"""masked_logprobs: values worked by hand, the numerics of extreme logits, and the in-place backward."""

import math
from typing import Any

import pytest
import torch
from devices import interpreted, seeded
from torch import Tensor

from rlhf_fast.ops import _vocab, masked_logprobs

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = float("inf"), float("nan")
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def run(
    rows: list[list[float]], targets: list[int], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, ...]:
    """(logprobs, entropy, gradient of the summed logprobs, gradient of the summed entropy)"""
    logits = torch.tensor(rows, dtype=dtype).requires_grad_()
    logprobs, entropy = masked_logprobs(logits, torch.tensor(targets), return_entropy=True, **options)
    (slope,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    (entropy_slope,) = torch.autograd.grad(entropy.sum(), logits)
    return logprobs.detach(), entropy.detach(), slope, entropy_slope


def test_two_columns_by_hand() -> None:
    """p = (1/4, 3/4): logits 0 and log 3."""
    logprobs, entropy, slope, entropy_slope = run([[0.0, math.log(3)], [0.0, math.log(3)]], [0, 1], torch.float64)
    h = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    truth = torch.tensor([-math.log(4), math.log(3 / 4)], dtype=torch.float64)
    torch.testing.assert_close(logprobs, truth)
    torch.testing.assert_close(entropy, torch.tensor([h, h], dtype=torch.float64))
    # one-hot minus p
    torch.testing.assert_close(slope, torch.tensor([[0.75, -0.75], [-0.25, 0.25]], dtype=torch.float64))
    # -p (log p + h)
    row = [-0.25 * (math.log(1 / 4) + h), -0.75 * (math.log(3 / 4) + h)]
    torch.testing.assert_close(entropy_slope, torch.tensor([row, row], dtype=torch.float64))


def test_temperature_and_softcap_by_hand() -> None:
    """Cap first: 2 tanh(x / 2) is 1 at x = log 3, since tanh(log(3) / 2) = 1/2; then 1 / 0.5 = 2."""
    options: dict[str, Any] = {"softcap": 2.0, "temperature": 0.5}
    logprobs, _, slope, _ = run([[0.0, math.log(3)]], [1], torch.float64, **options)
    p = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(p)], dtype=torch.float64))
    # d(capped) / dx = 1 - tanh^2: 1 at x = 0, 3/4 at x = log 3; both divided by 0.5
    expected = [[-(1 - p) * 1 / 0.5, (1 - p) * 0.75 / 0.5]]
    torch.testing.assert_close(slope, torch.tensor(expected, dtype=torch.float64))


def test_temperature_one_a_row() -> None:
    logits, targets = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(0, 5, (2, 3))
    temperature = torch.tensor([[0.5, 1.0, 2.0], [0.7, 3.0, 1.5]], dtype=torch.float64)
    together = masked_logprobs(logits, targets, temperature=temperature)
    for b in range(2):
        for t in range(3):
            alone = masked_logprobs(logits[b, t], targets[b, t], temperature=temperature[b, t].item())
            assert together[b, t] == alone
    scalar = masked_logprobs(logits, targets, temperature=torch.tensor(0.5))
    assert torch.equal(scalar, masked_logprobs(logits, targets, temperature=0.5))


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF, [1.0, 0.0], "hot"], ids=str)
def test_temperature_must_be_positive(temperature: Any, backend: str) -> None:
    if isinstance(temperature, list):
        temperature = torch.tensor(temperature)
        if temperature.is_cuda:  # where the check would synchronise
            result = masked_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), temperature=temperature)
            assert result.isnan().tolist() == [False, True]
            return
    with pytest.raises(ValueError, match="masked_logprobs: .*temperature must be"):
        masked_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), temperature=temperature)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("gap", [1.0, 8.0, 20.0, 60.0])
def test_a_confident_token_keeps_its_precision(dtype: torch.dtype, gap: float) -> None:
    """Logits (gap, 0, 0): log p = -log1p(2 e^-gap), 1 - p = 2 e^-gap / (1 + 2 e^-gap)."""
    logprobs, entropy, slope, _ = run([[gap, 0.0, 0.0]], [0], dtype)
    q = math.exp(-gap) / (1 + 2 * math.exp(-gap))
    assert logprobs.item() == pytest.approx(-math.log1p(2 * math.exp(-gap)), rel=1e-6)
    assert entropy.item() == pytest.approx(2 * q * (gap + math.log1p(2 * math.exp(-gap))) - (1 - 2 * q) * math.log1p(
        -2 * q), rel=2e-6)  # fmt: skip
    if dtype == torch.float16 and gap > 8:
        return  # the gradient is below the smallest float16
    rel = {torch.bfloat16: 2**-8, torch.float16: 2**-9}.get(dtype, 1e-5)
    assert slope[0].tolist() == [pytest.approx(2 * q, rel=rel), pytest.approx(-q, rel=rel), pytest.approx(-q, rel=rel)]


def test_an_unlikely_token_keeps_its_precision() -> None:
    logprobs, _, slope, _ = run([[-50.0, 0.0]], [0])
    assert logprobs.item() == pytest.approx(-50.0, rel=1e-7)
    assert slope[0].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("offset", [-1e4, -200.0, 1e4])
def test_large_logits(offset: float) -> None:
    """A common offset changes nothing; steps of 1/8 are exact in fp32 at 1e4."""
    row = [0.125, 1.0, -0.5, 2.25]
    shifted = run([[x + offset for x in row]], [2])
    for ours, plain in zip(shifted, run([row], [2]), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    logprobs, entropy, slope, entropy_slope = run([[1e4, -1e4, 0.0]] * 3, [0, 1, 2])
    assert logprobs.tolist() == [0.0, -2e4, -1e4]
    assert entropy.tolist() == [0.0] * 3
    assert slope.tolist() == [[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    assert (entropy_slope == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_minus_infinity_among_the_others(dtype: torch.dtype) -> None:
    """Columns at -inf have no effect."""
    logprobs, entropy, slope, entropy_slope = run([[0.3, -INF, 1.2, -INF]], [2], dtype)
    short = run([[0.3, 1.2]], [1], dtype)
    torch.testing.assert_close(logprobs, short[0])
    torch.testing.assert_close(entropy, short[1])
    torch.testing.assert_close(slope[:, [0, 2]], short[2])
    torch.testing.assert_close(entropy_slope[:, [0, 2]], short[3])
    assert (slope[:, [1, 3]] == 0).all() and (entropy_slope[:, [1, 3]] == 0).all()


def test_the_target_alone() -> None:
    """Certain: log p = 0, entropy 0 and no gradient."""
    for rows, target in [([[-INF, 5.0, -INF]], 1), ([[3.0]], 0)]:
        logprobs, entropy, slope, entropy_slope = run(rows, [target])
        assert logprobs.item() == 0.0 and entropy.item() == 0.0
        assert (slope == 0).all() and (entropy_slope == 0).all()


def test_minus_infinity_at_the_target() -> None:
    """log p = -inf; the gradient is one-hot minus p, p = (1/2, 0, 1/2)."""
    logprobs, entropy, slope, entropy_slope = run([[1.0, -INF, 1.0]], [1])
    assert logprobs.item() == -INF
    assert entropy.item() == pytest.approx(math.log(2), rel=1e-6)
    torch.testing.assert_close(slope, torch.tensor([[-0.5, 1.0, -0.5]]))
    torch.testing.assert_close(entropy_slope, torch.zeros(1, 3), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "bad",
    [[-INF] * 3, [NAN, 0.0, 0.0], [0.0, NAN, 0.0], [INF, 0.0, 0.0], [0.0, INF, 0.0], [INF, INF, 0.0], [INF, -INF, 0.0]],
    ids=str,
)
def test_a_bad_row_is_nan_alone(bad: list[float]) -> None:
    good = [0.5, -1.0, 2.0]
    mixed, clean = run([good, bad, good], [1, 1, 0]), run([good, good], [1, 0])
    for ours, theirs in zip(mixed, clean, strict=True):
        assert ours[1].isnan().all()
        assert torch.equal(ours[[0, 2]], theirs)


@pytest.mark.parametrize("vocab", [1, 2, 17, 50257, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabularies_padded_and_not(vocab: int, dtype: torch.dtype) -> None:
    generator = seeded(vocab)
    padded = torch.randn(3, vocab + 5, generator=generator).to(dtype)
    padded[:, vocab:] = NAN  # the padding must not be read either
    targets = torch.tensor([0, vocab // 2, vocab - 1])
    leaf = padded.clone().requires_grad_()
    logprobs, entropy = masked_logprobs(leaf, targets, vocab_size=vocab, return_entropy=True)
    (slope,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), leaf)

    exact = padded[:, :vocab].double().requires_grad_()
    log_p = exact.log_softmax(-1)
    true_logprobs, true_entropy = log_p[range(3), targets], -(log_p.exp() * log_p).sum(-1)
    (true_slope,) = torch.autograd.grad(true_logprobs.sum() + true_entropy.sum(), exact)
    torch.testing.assert_close(logprobs.double(), true_logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), true_entropy, rtol=1e-6, atol=1e-6)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(slope[:, :vocab].double(), true_slope, rtol=rounding, atol=1e-10 + rounding * 1e-6)
    assert (slope[:, vocab:] == 0).all()
    if padded.is_cuda:
        assert masked_logprobs(padded, torch.tensor([0, vocab, 0]), vocab_size=vocab).isnan().tolist() == [0, 1, 0]
        return
    with pytest.raises(IndexError, match=rf"\[0, {vocab}\); got {vocab} at position \(1,\)"):
        masked_logprobs(padded, torch.tensor([0, vocab, 0]), vocab_size=vocab)


@pytest.mark.parametrize("vocab", [2, 3, 7, 8, 17, 1000, 40001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_bitwise_the_same_in_any_batch(vocab: int, dtype: torch.dtype, threads: int, backend: str) -> None:
    generator = seeded(vocab)
    row = (torch.randn(vocab, generator=generator) * 3).to(dtype)

    def inside(rows: int, position: int) -> list[Tensor]:
        batch = torch.randn(rows, vocab, generator=generator).to(dtype)
        batch[position] = row
        logits = batch.requires_grad_()
        targets = torch.full((rows,), vocab // 2)
        logprobs, entropy = masked_logprobs(logits, targets, return_entropy=True)
        (slope,) = torch.autograd.grad((logprobs + 0.3 * entropy).sum(), logits)
        return [logprobs[position], entropy[position], slope[position]]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = inside(1, 0)
        for rows, position in [(2, 1), (9, 8), (17, 4), (17, 16)][: 1 if interpreted(backend) else None]:
            for ours, first in zip(inside(rows, position), alone, strict=True):
                assert torch.equal(ours, first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("chunk", [1, 7, 20, 1 << 20])
def test_chunking_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = seeded(0)
    rows = torch.randn(11, 7, generator=generator).tolist()
    whole = run(rows, [3] * 11)
    monkeypatch.setattr(_vocab, "CHUNK_ELEMENTS", chunk)
    for ours, theirs in zip(run(rows, [3] * 11), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """Row offsets past 2**31, in memory that is reserved and never touched; and a product N * V past it."""
    stride = 2**30
    memory = torch.empty(2 * stride + 3, dtype=torch.bfloat16)
    logits = memory.as_strided((3, 3), (stride, 1))
    logits.copy_(torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 8.0, -8.0]]))
    targets = torch.tensor([0, 2, 1])
    assert torch.equal(masked_logprobs(logits, targets), masked_logprobs(logits.clone(), targets))

    row, rows = torch.linspace(-1, 1, 65536).bfloat16(), 33 if interpreted(backend) else 32769
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[-1] = True
    logprobs = masked_logprobs(row.expand(rows, -1), torch.full((rows,), 65535), mask)
    assert logprobs[-1] == masked_logprobs(row, torch.tensor(65535))
    assert (logprobs[:-1] == 0).all()


def test_in_place_backward_writes_into_the_logits() -> None:
    generator = seeded(0)
    leaf = torch.randn(2, 3, 7, generator=generator, requires_grad=True)
    targets, mask = torch.randint(0, 5, (2, 3), generator=generator), torch.tensor([[1, 0, 1], [1, 1, 0]])
    options: dict[str, Any] = {"vocab_size": 5, "softcap": 3.0, "temperature": 0.7}

    def gradient(inplace: bool) -> tuple[Tensor, Tensor]:
        logits = leaf * 1.0
        loss = masked_logprobs(logits, targets, mask, inplace_backward=inplace, **options).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        return grad, logits.detach()

    plain, kept = gradient(False)
    ours, overwritten = gradient(True)
    assert torch.equal(ours, plain)
    assert torch.equal(overwritten, plain)
    assert torch.equal(kept, leaf.detach())


def test_in_place_backward_of_shared_memory_is_right() -> None:
    """In place, the gradients of an expanded row must not overwrite each other."""
    row = torch.randn(5, generator=seeded(0), requires_grad=True)
    targets = torch.tensor([0, 1, 4])
    (ours,) = torch.autograd.grad(masked_logprobs(row.expand(3, 5), targets, inplace_backward=True).sum(), row)
    (plain,) = torch.autograd.grad(masked_logprobs(row.expand(3, 5), targets).sum(), row)
    assert torch.equal(ours, plain)


def test_a_second_in_place_backward_is_an_error() -> None:
    logits = torch.randn(2, 5, requires_grad=True) * 1.0
    loss = masked_logprobs(logits, torch.tensor([0, 1]), inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second one; pass inplace_backward=False"):
        loss.backward()


@pytest.mark.parametrize("inplace", [True, False])
def test_logits_changed_before_the_backward_are_an_error(inplace: bool) -> None:
    logits = torch.randn(2, 5, requires_grad=True) * 1.0
    loss = masked_logprobs(logits, torch.tensor([0, 1]), inplace_backward=inplace).sum()
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_others_who_keep_the_logits_learn_of_the_in_place_backward() -> None:
    leaf = torch.randn(2, 5, requires_grad=True)
    logits = leaf * 1.0
    other = logits.square().sum()
    masked_logprobs(logits, torch.tensor([0, 1]), inplace_backward=True).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_a_second_backward_without_in_place_is_right() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    loss = masked_logprobs(logits, torch.tensor([0, 1])).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap must be a finite number > 0; got 0.0"),
        ({"vocab_size": 4}, "vocab_size must be an integer from 1 to the 3 columns; got 4"),
        ({"vocab_size": 0}, "vocab_size must be .* got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_logprobs(torch.zeros(1, 3), torch.tensor([0]), **options)


def test_logits_without_columns() -> None:
    with pytest.raises(ValueError, match="at least one column; got 0"):
        masked_logprobs(torch.zeros(1, 0), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., V\)"):
        masked_logprobs(torch.zeros(()), torch.tensor(0))
