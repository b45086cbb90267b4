"""How the CUDA kernels cut their work: on and beside the edges of chunks, tiles and blocks, at any alignment.

They run emulated where there is no GPU. The edge contract runs on them too, at small sizes.
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import emulation
import pytest
import torch
from devices import GPU, seeded, why_not
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels import records
from rlhf_fast.ops import _native
from rlhf_fast.ops._cuda import Cuda
from rlhf_fast.ops._dispatch import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_cuda"),
    pytest.mark.skipif(why_not("cuda") is not None, reason=str(why_not("cuda"))),
]

# the fixture only forces a backend, so all examples can share it
some_examples = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)
# of a chunk, a warp's tokens and a tile of gae, and of a tile of the others: below, on and above
EDGES = sorted({edge + step for edge in (4, 32, 128, 256, 1024, 2048) for step in (-1, 0, 1)})
lengths = st.one_of(st.integers(0, 2300), st.sampled_from(EDGES))
live_share = st.sampled_from([0.02, 0.6, 1.0])


def tokens(seed: int, count: int, *shape: int, share: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """``count`` tensors with NaN under the mask, and the mask."""
    generator = seeded(seed)
    mask = torch.rand(shape, generator=generator) < share
    poison = torch.where(mask, 0.0, torch.nan)
    return [torch.randn(shape, generator=generator) + poison for _ in range(count)], mask


def misaligned(x: Tensor) -> Tensor:
    """The same numbers at an address that is not 16-byte aligned."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@some_examples
@given(seed=seeds, rows=st.integers(1, 3), length=lengths, share=live_share, lam=st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_padded(seed: int, rows: int, length: int, share: float, lam: float) -> None:
    (rewards, values), mask = tokens(seed, 2, rows, length, share=share)
    got = ops.gae(rewards, values, mask, gamma=0.99, lam=lam)
    truth = ops.gae(rewards.double(), values.double(), mask, gamma=0.99, lam=lam)
    for ours, true in zip(got, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-4)
    same(ops.gae(misaligned(rewards), misaligned(values), misaligned(mask), gamma=0.99, lam=lam), got)


@some_examples
@given(seed=seeds, sizes=st.lists(lengths, min_size=1, max_size=4), share=live_share)
def test_gae_is_bitwise_the_same_however_a_sequence_is_given(seed: int, sizes: list[int], share: float) -> None:
    same_packed_and_padded(seed, sizes, share)


def test_gae_is_bitwise_the_same_at_sizes_of_every_kernel() -> None:
    """Fixed cases of the property above, for machines without hypothesis."""
    same_packed_and_padded(7, [100, 0, 2300, 1, 128, 1025], 0.8)


def same_packed_and_padded(seed: int, sizes: list[int], share: float) -> None:
    """Packed, a block takes all of a sequence; padded, several take a long one, and a warp a short one."""
    (rewards, values), mask = tokens(seed, 2, sum(sizes), share=share)
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    packed = ops.gae(rewards, values, mask, cu_seqlens=bounds)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        padded = ops.gae(rewards[None, start:stop], values[None, start:stop], mask[None, start:stop])
        same(tuple(x[start:stop] for x in packed), tuple(x[0] for x in padded))
    longest = max(sizes)
    inside = torch.arange(longest) < bounds.diff()[:, None]
    together = ops.gae(*(x.new_zeros(inside.shape).masked_scatter(inside, x) for x in (rewards, values, mask)))
    same(packed, tuple(x[inside] for x in together))


def test_gae_of_many_long_rows_goes_by_the_row() -> None:
    """From 256 rows on a block takes a row, below that a tile."""
    (rewards, values), mask = tokens(3, 2, 256, 1100, share=0.7)
    whole, few = (ops.gae(rewards[:rows], values[:rows], mask[:rows]) for rows in (256, 2))
    same(tuple(x[:2] for x in whole), few)


@given(inner=st.lists(st.integers(-5, 2300), max_size=5), whole=st.booleans())
@settings(some_examples, max_examples=40)
def test_gae_of_wrong_bounds_is_nan_everywhere(inner: list[int], whole: bool) -> None:
    """GPU kernels with unchecked bounds: they decrease, leave gaps, overlap or lie outside of the tokens."""
    wrong_bounds_give_nan([0, *inner, 2200] if whole else [*inner, 2200])


@pytest.mark.parametrize("wrong", [299, 300, 301, 598, 599], ids=str)
def test_gae_finds_a_wrong_bound_among_many(wrong: int) -> None:
    bounds = list(range(600)) + [2200]
    wrong_bounds_give_nan(bounds)
    bounds[wrong] = 0
    wrong_bounds_give_nan(bounds)


def wrong_bounds_give_nan(bounds: list[int]) -> None:
    count, guard = 2200, 64
    memory = torch.full((4, count + 2 * guard), 7.0)
    rewards, values, advantages, returns = (row[guard:-guard] for row in memory)
    at = torch.tensor(bounds)
    launch(
        records.Gae(
            sequences=len(bounds) - 1,
            length=count,
            cu_seqlens=at,
            rewards=rewards,
            values=values,
            live=None,
            gamma=0.9,
            lam=0.9,
            whiten=False,
            advantages=advantages,
            returns=returns,
        ),
        rewards,
    )
    assert (memory[:, :guard] == 7).all() and (memory[:, -guard:] == 7).all()
    right = bounds[0] == 0 and bounds[-1] == count and bounds == sorted(bounds) and len(bounds) > 1
    for result in (advantages, returns):
        assert (result.isfinite() if right else result.isnan()).all()


@some_examples
@given(seed=seeds, length=lengths, share=live_share, shift_mean=st.booleans(), offset=st.sampled_from([0.0, 1e4]))
def test_masked_whiten(seed: int, length: int, share: float, shift_mean: bool, offset: float) -> None:
    (x, weight), mask = tokens(seed, 2, length, share=share)
    x, weight = x + offset, weight.nan_to_num()

    def run(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        whitened = ops.masked_whiten(x, mask, shift_mean=shift_mean)
        return whitened.detach(), torch.autograd.grad((whitened * weight).sum(), x)[0]

    got, truth = run(x, mask), run(x.double(), mask)
    if mask.sum() > 2:
        for ours, true in zip(got, truth, strict=True):
            torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4)
    same(run(misaligned(x), misaligned(mask)), got)


AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@some_examples
@given(seed=seeds, rows=st.integers(1, 5), length=lengths, share=live_share, aggregation=st.sampled_from(AGGREGATIONS))
def test_ppo_loss(seed: int, rows: int, length: int, share: float, aggregation: str) -> None:
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "ref_logprobs")
    data, mask = tokens(seed, len(names), rows, length, share=share)

    def run(data: list[Tensor], mask: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(names, (x.detach().requires_grad_() for x in data), strict=True))
        result = ops.ppo_loss(**inputs, mask=mask, kl_coef=0.3, entropy_coef=0.1, aggregation=aggregation)
        wanted = [inputs[name] for name in ("logprobs", "values", "entropy")]
        return tuple(x.detach() for x in (*result, *torch.autograd.grad(result.loss, wanted)))

    got, truth = run(data, mask), run([x.double() for x in data], mask)
    for ours, true in zip(got, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2e-5, atol=2e-5)
    same(run([misaligned(x) for x in data], misaligned(mask)), got)


def test_num_items_on_the_device() -> None:
    (x, old, advantages), _ = tokens(5, 3, 2, 700)
    results = []
    for items in (torch.tensor(11.0, dtype=torch.float64), 11.0, torch.tensor(0.0, dtype=torch.float64), 1.0):
        loss, statistics = torch.empty(()), torch.empty(5)
        known = isinstance(items, float)
        policy = dict.fromkeys(records.PpoLoss._fields) | {"logprobs": x, "old_logprobs": old, "advantages": advantages}
        options = {
            "policy": True, "value": False, "sequences": 2, "length": 700, "sequence_level": False, "loss": loss,
            "terms": records.PolicyTerms(clip_low=0.2, clip_high=0.2), "value_terms": records.ValueTerms(),
            "divisor": records.LossDivisor(0, items if known else -1.0, None if known else items),
            "statistics": statistics,
        }  # fmt: skip
        launch(records.PpoLoss(**(policy | options)), loss)
        results.append((loss, statistics))
    same(results[0], results[1])
    same(results[2], results[3])


@pytest.mark.skipif(GPU, reason="the emulation counts launches")
def test_launches() -> None:
    """One each way; one more before the forward where the mask must be counted, or ratios are per sequence."""
    (x, *data), mask = tokens(6, 6, 3, 700)
    x.requires_grad_()

    def launched(call: Callable[[], Tensor], upstream: float) -> tuple[int, int]:
        before = emulation.launches()
        loss = call()
        between = emulation.launches()
        loss.backward(torch.tensor(upstream))
        return between - before, emulation.launches() - between

    by_length = {"aggregation": "seq-mean-token-mean"}
    for options, forward in (
        ({"num_items": 5}, 1),
        ({"num_items": torch.tensor(5.0)}, 1),
        ({"mask": None}, 1),
        ({"mask": None, **by_length}, 1),
        ({}, 2),
        (by_length, 2),
        ({"num_items": 5, **by_length}, 2),
    ):
        given = {"mask": mask, **options}
        assert launched(lambda given=given: ops.ppo_loss(x, *data, **given).loss, 3.0) == (forward, 1)
    level = {"ratio_level": "sequence", **by_length}
    assert launched(lambda: ops.clipped_policy_loss(x, *data[:2], mask, **level).loss, 1.0) == (2, 1)
    whitened = emulation.launches()
    ops.masked_whiten(x, mask)
    assert emulation.launches() - whitened == 2


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    launchers = SimpleNamespace(cannot_run=lambda: "no kernel image is available")
    engine = Cuda(SimpleNamespace(cuda=launchers), None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda_architectures": "80-real 90-real"})
    reason = engine.why_not(torch.device("cuda", 0))
    assert reason is not None and "CUDA says: no kernel image is available. " in reason
    assert "compiled for 80-real 90-real and this is 75: update the driver, or install" in reason
    assert "RLHF_FAST_CUDA_ARCHS=75" in reason
    alone = Cuda(SimpleNamespace(), None).why_not(torch.device("cuda", 0))
    assert alone is not None and alone.startswith("compiled for the CPU alone")
    assert Cuda(None, "not compiled").why_not(torch.device("cuda", 0)) == "not compiled"


def test_an_error_names_the_op_its_sizes_and_what_cuda_says() -> None:
    if GPU:
        pytest.skip("an error of this kind ends the process's use of the GPU")
    scratch, x, ticket = torch.empty(1 << 10), torch.randn(3000), torch.zeros((), dtype=torch.int32)
    moments = records.MaskedMoments(3000, x, None, None, torch.empty(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"^masked_moments: CUDA: .*device.h:\d+: .*16 bytes.* \(3000 elements\)$"):
        emulation.module().cuda.masked_moments(moments, scratch.data_ptr() + 4, 4096, ticket.data_ptr(), 0)
    many = records.TokenKl(1 << 45, x, x, None, 0, x)
    with pytest.raises(RuntimeError, match=r"^token_kl: CUDA: invalid configuration argument \(\d+ tokens\)$"):
        emulation.module().cuda.token_kl(many, 0, 0, 0, 0)
