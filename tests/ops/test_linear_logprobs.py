"""linear_logprobs: values worked by hand, the number of products, and the head's gradients."""

import math
from typing import Any

import pytest
import torch
from devices import seeded
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rlhf_fast.ops import _linear, linear_logprobs, masked_logprobs

pytestmark = pytest.mark.usefixtures("backend")

INF = float("inf")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def test_by_hand() -> None:
    """hidden (1, 2) on weight rows (0, 0) and (log 3, 0): logits (0, log 3), p = (1/4, 3/4)."""
    hidden = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([1]), return_entropy=True)
    assert logprobs.item() == pytest.approx(math.log(3 / 4), rel=1e-15)
    assert entropy.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), rel=1e-15)
    logprobs.sum().backward()
    # d logits = (-1/4, 1/4)
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.25 * math.log(3), 0.0]], dtype=torch.float64))
    torch.testing.assert_close(weight.grad, torch.tensor([[-0.25, -0.5], [0.25, 0.5]], dtype=torch.float64))


def test_lora_and_bias_by_hand() -> None:
    """A reads the second feature, B writes it to column 1, doubled: logits (0, 2 * 3) + (6, 0) = (6, 6)."""
    lora = (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [1.0]]), 2.0)
    hidden, weight, bias = torch.tensor([[7.0, 3.0]]), torch.zeros(2, 2), torch.tensor([6.0, 0.0])
    logprobs = linear_logprobs(hidden, weight, torch.tensor([0]), bias=bias, lora=lora)
    assert logprobs.item() == pytest.approx(-math.log(2), rel=1e-6)


def test_bias_of_minus_infinity_removes_a_column() -> None:
    hidden, weight = normal(3, 4).requires_grad_(), normal(5, 4, seed=1)
    bias = torch.tensor([0.0, -INF, 0.0, 0.0, -INF], dtype=torch.float64)
    ours = linear_logprobs(hidden, weight, torch.tensor([0, 2, 3]), bias=bias)
    short = linear_logprobs(hidden, weight[[0, 2, 3]], torch.tensor([0, 1, 2]))
    torch.testing.assert_close(ours, short, rtol=1e-13, atol=1e-13)
    grads = [torch.autograd.grad(result.sum(), hidden)[0] for result in (ours, short)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)


def test_softcap_temperature_and_vocab_size_are_those_of_masked_logprobs() -> None:
    hidden, weight, targets = normal(2, 3, 4), normal(9, 4, seed=1), torch.tensor([[0, 1, 6], [2, -100, 3]])
    temperature = torch.tensor([[0.5, 1.0, 2.0], [0.7, 1.0, 1.5]], dtype=torch.float64)
    options: dict[str, Any] = {"softcap": 2.0, "temperature": temperature, "vocab_size": 7, "return_entropy": True}
    ours = linear_logprobs(hidden, weight, targets, **options)
    theirs = masked_logprobs(hidden @ weight.T, targets, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_padding_rows_of_the_head_get_no_gradient() -> None:
    hidden, weight, bias = normal(3, 4), normal(9, 4, seed=1).requires_grad_(), normal(9, seed=2).requires_grad_()
    logprobs = linear_logprobs(hidden, weight, torch.tensor([0, 1, 6]), bias=bias, vocab_size=7)
    grad_weight, grad_bias = torch.autograd.grad(logprobs.sum(), (weight, bias))
    assert (grad_weight[7:] == 0).all() and (grad_bias[7:] == 0).all()
    assert (grad_weight[:7] != 0).all()


def flops(trained: bool, live: int, tokens: int = 8) -> int:
    hidden, weight = normal(tokens, 4).requires_grad_(), normal(9, 4, seed=1).requires_grad_(trained)
    mask = torch.arange(tokens) < live
    with FlopCounterMode(display=False) as counter:
        linear_logprobs(hidden, weight, torch.zeros(tokens, dtype=torch.int64), mask).sum().backward()
    return counter.get_total_flops()


def test_masked_tokens_and_a_frozen_weight_cost_nothing() -> None:
    """A product of n live tokens is 2 n H V operations: logits, again in the backward, d hidden; and d weight."""
    product = 2 * 4 * 9
    assert flops(trained=False, live=8) == 3 * 8 * product
    assert flops(trained=False, live=3) == 3 * 3 * product
    assert flops(trained=True, live=8) == 4 * 8 * product
    assert flops(trained=True, live=0) == 0


def test_the_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab = 64, 50
    monkeypatch.setattr(_linear, "CHUNK_ELEMENTS", 4 * vocab)
    hidden, weight = normal(tokens, 4).requires_grad_(), normal(vocab, 4, seed=1)
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_logprobs(hidden, weight, torch.zeros(tokens, dtype=torch.int64))
    assert max(sizes) <= tokens * 4 < 4 * vocab * 2


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_chunking_changes_nothing_but_rounding(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Tensor, ...]:
        hidden, weight = normal(7, 4).requires_grad_(), normal(9, 4, seed=1).requires_grad_()
        results = linear_logprobs(hidden, weight, torch.arange(7), return_entropy=True)
        return *results, *torch.autograd.grad(results[0].sum() + results[1].sum(), (hidden, weight))

    whole = run()
    monkeypatch.setattr(_linear, "CHUNK_ELEMENTS", rows * 9)
    torch.testing.assert_close(run(), whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_weight_gathers_its_gradient_in_full(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 chunks of one token each: added up in a half dtype, the sum would stop growing after a few hundred."""
    monkeypatch.setattr(_linear, "CHUNK_ELEMENTS", 1)
    hidden, weight = torch.ones(512, 2, dtype=dtype), torch.zeros(2, 2, dtype=dtype, requires_grad=True)
    down, up = torch.ones(1, 2, dtype=dtype), torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    logprobs = linear_logprobs(hidden, weight, torch.zeros(512, dtype=torch.int64), lora=(down, up, 1.0))
    grad_weight, grad_up = torch.autograd.grad(logprobs.sum(), (weight, up))
    assert grad_weight.dtype == dtype
    assert grad_weight.tolist() == [[256.0] * 2, [-256.0] * 2]  # 512 times 1 - p = 1/2
    assert grad_up.tolist() == [[512.0], [-512.0]]  # hidden A^T = 2


def test_autocast_rounds_the_operands_and_not_the_logits() -> None:
    hidden, weight = normal(5, 64, dtype=torch.float32), normal(50, 64, seed=1, dtype=torch.float32)
    targets = torch.arange(5)
    plain = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        assert torch.equal(linear_logprobs(hidden, weight, targets), plain)


def test_an_adapter_in_float32_on_a_bfloat16_head() -> None:
    hidden, weight = normal(5, 8, dtype=torch.bfloat16), normal(9, 8, seed=1, dtype=torch.bfloat16)
    down, up = normal(2, 8, seed=2, dtype=torch.float32), normal(9, 2, seed=3, dtype=torch.float32)
    ours = linear_logprobs(hidden, weight, torch.arange(5), lora=(down, up, 0.5))
    exact = hidden.double() @ (weight.double() + 0.5 * up.double() @ down.double()).T
    torch.testing.assert_close(ours.double(), exact.log_softmax(-1).diagonal(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"weight": torch.zeros(9, 5)}, ValueError, r"weight must have shape \(V, 4\).* got \(9, 5\)"),
        ({"weight": torch.zeros(9, 4).bfloat16()}, TypeError, "weight must be torch.float32 like hidden"),
        ({"weight": torch.zeros(9)}, ValueError, r"weight must have shape \(V, 4\)"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \(9,\)"),
        ({"lora": (torch.zeros(2, 4), torch.zeros(9, 3), 1.0)}, ValueError, r"lora B must have shape \(9, 2\)"),
        ({"lora": (torch.zeros(2, 5), torch.zeros(9, 2), 1.0)}, ValueError, r"lora A must have shape \(2, 4\)"),
        ({"lora": (torch.zeros(2, 4), torch.zeros(9, 2))}, TypeError, r"lora must be a tuple \(A, B, scale\)"),
        ({"lora": (torch.zeros(2, 4), torch.zeros(9, 2), "1")}, TypeError, "lora scale must be a number; got str"),
        ({"vocab_size": 10}, ValueError, "vocab_size must be an integer from 1 to the 9 columns; got 10"),
        ({"softcap": -1.0}, ValueError, "softcap must be"),
    ],
    ids=lambda value: "",
)
def test_bad_heads(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "targets": torch.zeros(3).long()} | change
    with pytest.raises(kind, match=f"linear_logprobs: {message}"):
        linear_logprobs(**arguments)
