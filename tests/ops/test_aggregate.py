import math

import pytest
import torch
from devices import seeded
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.ops import aggregate
from rlhf_fast.ops._aggregate import AGGREGATIONS, masked_mean, ordered_sum, upcast

SEQUENCE_AGGREGATIONS = AGGREGATIONS[1:]
VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
LIVE = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)

# By hand, the live values being (1, 2), (4) and none: the total is 7, there are 3 live tokens and 2 sequences.
BY_HAND = {
    "token-mean": 7 / 3,
    "seq-mean-token-sum": (3 + 4) / 2,
    "seq-mean-token-mean": (1.5 + 4) / 2,
    "seq-mean-token-sum-norm": 7 / (2 * 3),
}
BY_HAND_OF_10_ITEMS = {
    "token-mean": 7 / 10,
    "seq-mean-token-sum": 7 / 10,
    "seq-mean-token-mean": 5.5 / 10,
    "seq-mean-token-sum-norm": 7 / (10 * 3),
}
# d / d value of a live token: row 0 has two of them, row 1 has one
GRADIENT_BY_HAND = {
    "token-mean": (1 / 3, 1 / 3),
    "seq-mean-token-sum": (1 / 2, 1 / 2),
    "seq-mean-token-mean": (1 / 4, 1 / 2),
    "seq-mean-token-sum-norm": (1 / 6, 1 / 6),
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_by_hand(aggregation: str) -> None:
    assert aggregate(VALUES, LIVE, aggregation=aggregation).item() == pytest.approx(BY_HAND[aggregation], rel=1e-6)


@pytest.mark.parametrize("num_items", [10, 10.0, "tensor"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_num_items_by_hand(aggregation: str, num_items: float | str) -> None:
    items = torch.tensor(10) if isinstance(num_items, str) else num_items
    got = aggregate(VALUES, LIVE, aggregation=aggregation, num_items=items)
    assert got.item() == pytest.approx(BY_HAND_OF_10_ITEMS[aggregation], rel=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_by_hand_and_masked_nan_is_not_read(aggregation: str) -> None:
    values = torch.where(LIVE, VALUES, torch.nan).requires_grad_()
    loss = aggregate(values, LIVE, aggregation=aggregation)
    loss.backward()
    assert loss.item() == pytest.approx(BY_HAND[aggregation], rel=1e-6)
    first, second = GRADIENT_BY_HAND[aggregation]
    torch.testing.assert_close(values.grad, torch.tensor([[first, first, 0], [second, 0, 0], [0, 0, 0]]))


def test_without_a_mask_every_token_counts() -> None:
    # rows sum to 6, 15, 24; 9 tokens, 3 sequences of 3
    for aggregation, expected in zip(AGGREGATIONS, (5, 15, 5, 5), strict=True):
        assert aggregate(VALUES, None, aggregation=aggregation).item() == expected


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("num_items", [None, 0, 4])
def test_nothing_live_gives_zero_and_zero_gradient(
    aggregation: str, shape: tuple[int, int], num_items: int | None
) -> None:
    values = torch.full(shape, torch.nan, requires_grad=True)
    loss = aggregate(values, torch.zeros(shape, dtype=torch.bool), aggregation=aggregation, num_items=num_items)
    loss.backward()
    assert loss.item() == 0 and loss.dim() == 0
    assert torch.equal(values.grad, torch.zeros(shape))


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 6), cut=st.integers(0, 6), length=st.integers(0, 5))
def test_micro_batches_with_num_items_add_up_to_the_whole_batch(seed: int, rows: int, cut: int, length: int) -> None:
    generator = seeded(seed)
    values = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    live = torch.rand(rows, length, generator=generator) < 0.5
    for aggregation in AGGREGATIONS:
        items = live.sum() if aggregation == "token-mean" else live.any(-1).sum()
        parts = [
            aggregate(values[part], live[part], aggregation=aggregation, num_items=items)
            for part in (slice(0, cut), slice(cut, None))
        ]
        torch.testing.assert_close(sum(parts), aggregate(values, live, aggregation=aggregation))


def test_the_sum_is_bitwise_the_same_for_every_thread_count() -> None:
    values = torch.randn(3_000_001, generator=seeded(0)) * 1e3
    threads = torch.get_num_threads()
    try:
        sums = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            sums.append((ordered_sum(values).item(), aggregate(values, None, aggregation="token-mean").item()))
    finally:
        torch.set_num_threads(threads)
    assert len(set(sums)) == 1
    assert sums[0][0] == pytest.approx(values.double().sum().item(), abs=1.0)  # the sum of abs(values) is 2.4e9


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1025, 5000])
def test_ordered_sum_is_the_sum(length: int) -> None:
    values = torch.arange(2 * length, dtype=torch.float64).reshape(2, length)
    expected = torch.tensor([math.fsum(row) for row in values.tolist()], dtype=torch.float64)
    assert torch.equal(ordered_sum(values), expected)  # whole numbers below 2^53: exact in any order
    assert torch.equal(ordered_sum(values.T.contiguous().T), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_strided_transposed_and_expanded_values(aggregation: str) -> None:
    expected = torch.tensor(BY_HAND[aggregation])
    wide = torch.full((3, 6), torch.nan)
    wide[:, ::2] = VALUES
    for values in (wide[:, ::2], VALUES.T.contiguous().T):
        torch.testing.assert_close(aggregate(values, LIVE, aggregation=aggregation), expected)
    row = VALUES[:1].expand(3, 3)
    torch.testing.assert_close(
        aggregate(row, LIVE, aggregation=aggregation), aggregate(row.clone(), LIVE, aggregation=aggregation)
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck(aggregation: str) -> None:
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    live = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda v: aggregate(v, live, aggregation=aggregation), values)


def test_half_precision_is_added_in_float32() -> None:
    values = torch.ones(1, 70_000, dtype=torch.float16)  # above the largest float16
    total = aggregate(values, None, aggregation="seq-mean-token-sum")
    assert total.dtype == torch.float32 and total.item() == 70_000


def test_masked_mean() -> None:
    assert masked_mean(VALUES, LIVE).item() == pytest.approx(7 / 3)
    assert masked_mean(VALUES.reshape(-1), None).item() == 5
    assert masked_mean(torch.empty(0), None).item() == 0


def test_upcast_takes_the_widest() -> None:
    half, single, double = (torch.ones(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert [tensor.dtype for tensor in upcast(half, single)] == [torch.float32] * 2
    assert [tensor.dtype for tensor in upcast(half, double)] == [torch.float64] * 2


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="aggregation must be one of token-mean.*'mean'"):
        aggregate(VALUES, LIVE, aggregation="mean")
    for aggregation in SEQUENCE_AGGREGATIONS:
        with pytest.raises(ValueError, match=r"needs \(B, T\).*got shape \(9,\)"):
            aggregate(VALUES.reshape(-1), LIVE.reshape(-1), aggregation=aggregation)
    for number in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite number >= 0"):
            aggregate(VALUES, LIVE, aggregation="token-mean", num_items=number)
    with pytest.raises(TypeError, match="num_items must be a number.*got str"):
        aggregate(VALUES, LIVE, aggregation="token-mean", num_items="3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0-dim tensor; got shape \(1,\)"):
        aggregate(VALUES, LIVE, aggregation="token-mean", num_items=torch.ones(1))
    with pytest.raises(ValueError, match="num_items must be on (cpu|cuda:0); got meta"):
        aggregate(VALUES, LIVE, aggregation="token-mean", num_items=torch.ones((), device="meta"))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_are_factors_that_leave_the_divisor(aggregation: str) -> None:
    weights = torch.tensor([[0.5, 2.0, torch.nan], [3.0, torch.inf, -1.0], [1.0, 1.0, 1.0]])
    factors = torch.where(LIVE, weights, 0.0)
    values = VALUES.masked_fill(~LIVE, torch.nan).requires_grad_()
    own = aggregate(values, LIVE, weights=weights, aggregation=aggregation)
    true = aggregate(values * factors, LIVE, aggregation=aggregation)
    torch.testing.assert_close(own, true)
    torch.testing.assert_close(*(torch.autograd.grad(each, values)[0] for each in (own, true)))
    mean = aggregate(values, LIVE, weights=weights, num_items=factors.sum())
    assert mean.item() == pytest.approx((0.5 * 1 + 2 * 2 + 3 * 4) / 5.5)


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match=r"aggregate: weights must have shape \(3, 3\)"):
        aggregate(VALUES, weights=VALUES[:1])
    with pytest.raises(TypeError, match="aggregate: weights must be float64"):
        aggregate(VALUES, weights=LIVE)
