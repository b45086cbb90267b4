"""linear_cross_entropy: reductions by hand, and against torch's own on whole logits."""

import math
from typing import Any

import pytest
import torch
from devices import seeded

from rlhf_fast.ops import linear_cross_entropy

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
        ({"num_items": torch.ones(2)}, r"num_items must be a number or a 0-dim tensor; got shape \(2,\)"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(HIDDEN, WEIGHT, LABELS, **options)
