import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from devices import device_of, interpreted, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_fast.ops.masked_whiten import masked_whiten

pytestmark = pytest.mark.usefixtures("backend")

X = torch.tensor([[2.0, 4.0], [6.0, 100.0]])
MASK = torch.tensor([[1, 1], [1, 0]])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # live values 2, 4, 6: mean 4, squared deviations 4 + 0 + 4 = 8, variance 8 / 2 = 4 or 8 / 3
        ({}, [[-1.0, 0.0], [1.0, 0.0]]),
        ({"shift_mean": False}, [[3.0, 4.0], [5.0, 0.0]]),
        ({"unbiased": False}, [[-math.sqrt(1.5), 0.0], [math.sqrt(1.5), 0.0]]),
    ],
)
def test_by_hand(arguments: dict[str, bool], expected: list[list[float]]) -> None:
    torch.testing.assert_close(masked_whiten(X, MASK, **arguments), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_epsilon_is_added_to_the_variance_by_hand() -> None:
    # deviations -d and d, variance 2 d^2 / 1; at d = 1e-4, d / sqrt(2e-8 + 1e-8) = 1 / sqrt(3)
    got = masked_whiten(torch.tensor([-1e-4, 1e-4]))
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0]) / math.sqrt(3), rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    mean=st.sampled_from([0.0, -3.0, 1000.0]),
    unbiased=st.booleans(),
)
def test_mean_0_and_variance_1_over_live_elements(seed: int, shape: list[int], mean: float, unbiased: bool) -> None:
    generator = seeded(seed)
    x = torch.randn(shape, generator=generator) + mean
    mask = torch.rand(shape, generator=generator) < 0.7
    mask.view(-1)[:2] = True
    x.view(-1)[:2] = mean + torch.tensor([-1.0, 1.0])  # so that the variance is far above the epsilon
    poisoned = torch.where(mask, x, torch.nan)
    live = masked_whiten(poisoned, mask, unbiased=unbiased)[mask].double()
    assert live.mean().item() == pytest.approx(0, abs=1e-3 if mean == 1000 else 1e-6)  # ulp(1000) is 6e-5
    assert live.var(unbiased=unbiased).item() == pytest.approx(1, rel=1e-5)
    kept = masked_whiten(poisoned, mask, shift_mean=False, unbiased=unbiased)[mask].double()
    torch.testing.assert_close(kept, live + x[mask].double().mean(), rtol=1e-6, atol=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(2, 3000),
    mean=st.sampled_from([0.0, -3.0, 100.0]),
    live_share=st.sampled_from([0.02, 0.7, None]),
    shift_mean=st.booleans(),
    unbiased=st.booleans(),
)
def test_values_and_gradients_against_float64(
    seed: int, size: int, mean: float, live_share: float | None, shift_mean: bool, unbiased: bool
) -> None:
    generator = seeded(seed)
    x = torch.randn(size, generator=generator) + mean
    weight = torch.randn(size, generator=generator)
    mask = torch.rand(size, generator=generator) < (live_share or 1.0)
    mask[:2] = True
    x[:2] = mean + torch.tensor([-1.0, 1.0])
    ours = torch.where(mask, x, torch.nan).requires_grad_()
    whitened = masked_whiten(ours, None if live_share is None else mask, shift_mean=shift_mean, unbiased=unbiased)
    (whitened * weight).sum().backward()

    live = x[mask].double().requires_grad_()
    truth = (live - live.mean()) / (live.var(unbiased=unbiased) + 1e-8).sqrt() + (0 if shift_mean else live.mean())
    (truth * weight[mask]).sum().backward()
    tolerance = 2e-6 * (1 + abs(mean))
    torch.testing.assert_close(whitened[mask].double(), truth, rtol=2e-6, atol=tolerance)
    torch.testing.assert_close(ours.grad[mask].double(), live.grad, rtol=2e-5, atol=tolerance * 10)
    assert (whitened[~mask] == 0).all() and (ours.grad[~mask] == 0).all()


def test_a_large_mean_does_not_cancel() -> None:
    x = torch.randn(1000, generator=seeded(0)) + 1e5
    truth = (x.double() - x.double().mean()) / x.double().std()
    torch.testing.assert_close(masked_whiten(x), truth.float(), rtol=1e-4, atol=1e-2)  # ulp(1e5) is 8e-3


@pytest.mark.parametrize("arguments", [{}, {"shift_mean": False}, {"unbiased": False}])
def test_gradcheck(arguments: dict[str, bool]) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: masked_whiten(x, mask, **arguments), x)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_masked_elements_are_not_read(shift_mean: bool, poison: float) -> None:
    x = torch.where(MASK == 1, X, poison).requires_grad_()
    whitened = masked_whiten(x, MASK, shift_mean=shift_mean)
    assert torch.equal(whitened.detach(), masked_whiten(X, MASK, shift_mean=shift_mean))
    assert whitened[1, 1].item() == 0
    whitened.square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[1, 1].item() == 0


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("shape", [(0,), (0, 2), (2, 0), (2, 2)])
def test_empty_and_all_masked(shape: tuple[int, ...], shift_mean: bool) -> None:
    x = torch.full(shape, torch.nan, requires_grad=True)
    whitened = masked_whiten(x, torch.zeros(shape), shift_mean=shift_mean)
    whitened.sum().backward()
    assert torch.equal(whitened, torch.zeros(shape)) and torch.equal(x.grad, torch.zeros(shape))


def test_one_live_element_and_equal_elements_have_variance_0() -> None:
    assert masked_whiten(X, torch.tensor([[0, 1], [0, 0]])).tolist() == [[0, 0], [0, 0]]
    assert masked_whiten(X, torch.tensor([[0, 1], [0, 0]]), shift_mean=False).tolist() == [[0, 4], [0, 0]]
    assert masked_whiten(torch.full((5,), 3.0)).tolist() == [0.0] * 5


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_gradient_at_variance_0_by_hand(shift_mean: bool, unbiased: bool) -> None:
    # every deviation is 0, so that only the mean moves: d y_i = 1e4 (d x_i - mean d x), + mean d x where it is kept
    kept = 0.0 if shift_mean else 2.0
    x = torch.full((3,), 5.0, requires_grad=True)
    masked_whiten(x, shift_mean=shift_mean, unbiased=unbiased).backward(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(x.grad, torch.tensor([-1e4, 0, 1e4]) + kept)
    x.grad = None
    masked_whiten(x, torch.tensor([0, 1, 0]), shift_mean=shift_mean, unbiased=unbiased).backward(torch.full((3,), 2.0))
    torch.testing.assert_close(x.grad, torch.tensor([0, kept, 0]))


def test_a_live_nan_is_not_hidden() -> None:
    assert torch.isnan(masked_whiten(torch.tensor([1.0, torch.nan, 2.0]))).all()


def test_strides_and_dtypes() -> None:
    x = torch.randn(6, 8, generator=seeded(2)).bfloat16()
    mask = torch.arange(48).reshape(6, 8) % 5 != 0
    expected = masked_whiten(x.float(), mask)
    half = masked_whiten(x, mask)
    assert half.dtype == torch.float32 and torch.equal(half, expected)
    assert torch.equal(masked_whiten(x.T.contiguous().T, mask.T.contiguous().T), expected)
    assert torch.equal(
        masked_whiten(x[:1].expand(6, 8), mask[:, ::2].repeat_interleave(2, 1)),
        masked_whiten(x[:1].repeat(6, 1), mask[:, ::2].repeat_interleave(2, 1)),
    )
    assert masked_whiten(x.double(), mask).dtype == torch.float64


def test_bitwise_the_same_for_every_thread_count(backend: str) -> None:
    x, weight = torch.randn(2, 5_001 if interpreted(backend) else 300_001, generator=seeded(3)).unbind()
    x.requires_grad_()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            whitened = masked_whiten(x)
            results.append(torch.cat((whitened, *torch.autograd.grad((whitened * weight).sum(), x))))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def _one_rank(rank: int, folder: Path, arguments: dict[str, Any]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    rows = slice(0, 1) if rank == 0 else slice(1, 3)
    everything = torch.load(folder / "inputs.pt")
    x, mask = everything["x"][rows], everything["mask"][rows]
    torch.save(masked_whiten(x, mask, group=torch.distributed.group.WORLD, **arguments), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("arguments", [{}, {"shift_mean": False, "unbiased": False}])
def test_a_group_shares_its_statistics(tmp_path: Path, arguments: dict[str, Any], backend: str) -> None:
    """Two ranks with unequal shares get what one process gets from the whole batch."""
    if device_of(backend) == "cuda":
        pytest.skip("a process that used a GPU cannot be forked")
    generator = seeded(4)
    x, mask = torch.randn(3, 5, generator=generator) + 2, torch.rand(3, 5, generator=generator) < 0.7
    torch.save({"x": x, "mask": mask}, tmp_path / "inputs.pt")
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_one_rank, args=(rank, tmp_path, arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    together = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)])
    torch.testing.assert_close(together, masked_whiten(x, mask, **arguments), rtol=1e-6, atol=1e-6)


def test_a_group_refuses_a_gradient() -> None:
    # refused before the group is used, so any object works here
    with pytest.raises(ValueError, match=r"x without gradient when group is given.*Pass x.detach\(\)"):
        masked_whiten(X.clone().requires_grad_(), group=object())  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="x must be float64.*torch.int64"):
        masked_whiten(X.long())
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 2\).*got \(2,\)"):
        masked_whiten(X, torch.ones(2))
    with pytest.raises(ValueError, match="one device"):
        masked_whiten(X, MASK.to("meta"))
