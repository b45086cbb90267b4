"""linear_cross_entropy: reductions by hand, and against torch's own on whole logits."""

import math
from typing import Any

import pytest
import torch
from devices import seeded

from rlhf_fast.ops import aggregate, linear_cross_entropy, linear_logprobs, masked_logprobs

pytestmark = pytest.mark.usefixtures("backend")

# logits (0, log 3) for hidden 1 and (0, 0) for hidden 0
WEIGHT = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
HIDDEN = torch.tensor([[[1.0], [0.0], [1.0], [1.0]]], dtype=torch.float64)
LABELS = torch.tensor([[0, 1, -100, 1]])
LOSSES = [math.log(4), math.log(2), 0.0, math.log(4 / 3)]


def test_reductions_by_hand() -> None:
    none = linear_cross_entropy(HIDDEN, WEIGHT, LABELS, reduction="none")
    assert none.shape == (1, 4)
    assert none[0].tolist() == pytest.approx(LOSSES, rel=1e-15)
    assert linear_cross_entropy(HIDDEN, WEIGHT, LABELS, reduction="sum").item() == pytest.approx(sum(LOSSES))
    assert linear_cross_entropy(HIDDEN, WEIGHT, LABELS).item() == pytest.approx(sum(LOSSES) / 3)


def test_num_items_is_the_divisor() -> None:
    for num_items in (10, torch.tensor(10)):
        loss = linear_cross_entropy(HIDDEN, WEIGHT, LABELS, num_items=num_items)
        assert loss.item() == pytest.approx(sum(LOSSES) / 10)


def test_micro_batches_add_up_to_the_batch() -> None:
    generator = seeded(0)
    hidden = torch.randn(4, 6, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 5, (4, 6), generator=generator)
    labels[0, 1:] = -100  # micro-batches of unequal counts
    whole = linear_cross_entropy(hidden, weight, labels)
    count = (labels != -100).sum()
    parts = [linear_cross_entropy(h, weight, y, num_items=count) for h, y in zip(hidden, labels, strict=True)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_agrees_with_torch_and_shifts_nothing() -> None:
    generator = seeded(0)
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 6, (2, 5), generator=generator)
    labels[1, 2] = 6
    logits = hidden @ weight.T
    truth = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=6)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, ignore_index=6), truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_items": 3.0}, {"reduction": "sum"}, {"reduction": "none"}], ids=str)
def test_the_sum_of_the_parts(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Value and gradients of -linear_logprobs, and of -masked_logprobs of whole logits, aggregated."""
    generator = seeded(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    trained = hidden, weight, bias, down, up = normal(2, 4, 3), normal(9, 3), normal(9), normal(2, 3), normal(9, 2)
    labels = torch.randint(7, (2, 4), generator=generator)
    labels[0, 1] = labels[1, 3] = 5
    temperature = torch.tensor([0.7, 1.3])[:, None].expand(2, 4)
    shared: dict[str, Any] = {"temperature": temperature, "softcap": 4.0, "vocab_size": 7, "ignore_index": 5}
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, lora=(down, up, 0.5), **shared, **options)
    weights = torch.ones_like(loss) if loss.dim() == 0 else torch.linspace(0, 1, 8).to(dtype).view(2, 4)
    grads = torch.autograd.grad((loss * weights).sum(), trained)

    logits = hidden @ weight.T + bias + 0.5 * (hidden @ down.T) @ up.T
    items = 1.0 if options.get("reduction") == "sum" else options.get("num_items")
    for logprobs in (
        linear_logprobs(hidden, weight, labels, bias=bias, lora=(down, up, 0.5), **shared),
        masked_logprobs(logits, labels, **shared),
    ):
        whole = -logprobs if loss.dim() else aggregate(-logprobs, labels != 5, num_items=items)
        close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
        torch.testing.assert_close(loss, whole, **close)
        torch.testing.assert_close(grads, torch.autograd.grad((whole * weights).sum(), trained), **close)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_and_label_smoothing(reduction: str, dtype: torch.dtype, smoothing: float) -> None:
    """Against torch's own on whole logits in float64; a masked state and a masked weight are never read."""
    generator = seeded(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    trained = hidden, weight, bias, down, up = normal(2, 4, 3), normal(9, 3), normal(9), normal(2, 3), normal(9, 2)
    labels = torch.randint(7, (2, 4), generator=generator)
    labels[0, 1] = -100
    weights = torch.linspace(0.1, 1.5, 8).view(2, 4)
    temperature = torch.linspace(0.5, 2, 8).view(2, 4)
    dead = labels == -100
    loss = linear_cross_entropy(
        hidden.masked_fill(dead[..., None], math.nan), weight, labels, bias=bias, lora=(down, up, 0.5), vocab_size=7,
        temperature=temperature, reduction=reduction, label_smoothing=smoothing,
        weights=weights.masked_fill(dead, math.nan),
    )  # fmt: skip
    grads = torch.autograd.grad(loss.sum(), trained)

    exact = [tensor.detach().double().requires_grad_() for tensor in trained]
    h, w, b, a, u = exact
    logits = ((h @ w.T + b + 0.5 * (h @ a.T) @ u.T) / temperature[..., None])[..., :7]
    true = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing
    ).view(2, 4)
    true = true * weights
    true = true if reduction == "none" else true.sum() / (7 if reduction == "mean" else 1)
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 5e-6}
    torch.testing.assert_close(loss.double(), true, **close)
    if dtype == torch.bfloat16:
        close = {"rtol": 2e-2, "atol": 2e-2}
    for own, right in zip(grads, torch.autograd.grad(true.sum(), exact), strict=True):
        torch.testing.assert_close(own.double(), right, **close)


def test_no_label_counts() -> None:
    hidden = HIDDEN.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, WEIGHT, torch.full_like(LABELS, -100))
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0 and (grad == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "average"}, "reduction must be one of mean, sum, none; got 'average'"),
        ({"reduction": "sum", "num_items": 3}, "num_items is the divisor of reduction='mean'; got reduction='sum'"),
        ({"num_items": -1}, "num_items must be a finite number >= 0; got -1"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\); got 1"),
        ({"label_smoothing": 0.1, "softcap": 5.0}, "label_smoothing needs softcap=None.*got 5"),
        ({"weights": torch.zeros(2, 4)}, r"weights must have shape \(1, 4\)"),
        ({"num_items": torch.ones(2)}, r"num_items must be a number or a 0-dim tensor; got shape \(2,\)"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(HIDDEN, WEIGHT, LABELS, **options)
