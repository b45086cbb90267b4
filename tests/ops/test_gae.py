import sys

import pytest
import torch
from devices import GPU_BACKENDS, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.masked_whiten import masked_whiten

pytestmark = pytest.mark.usefixtures("backend")

seeds = st.integers(0, 2**32 - 1)
unit = st.sampled_from([0.0, 0.3, 0.95, 1.0])
# the fixture only forces a backend, so all examples can share it
every_example = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

REWARDS = torch.tensor([[1.0, 2.0, 3.0]])
VALUES = torch.tensor([[0.5, 1.0, 2.0]])


def by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """sum over k of (gamma lam)^k delta_{t+k}, of one sequence whose tokens are all live."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def sample(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    rewards, values = torch.randn(2, *shape, generator=generator).unbind()
    return rewards, values, torch.rand(shape, generator=generator) < 0.6


def test_by_hand() -> None:
    # gamma = lam = 1/2, so gamma lam = 1/4, from the last token back:
    # delta_2 = 3 - 2 = 1,                 advantage 1,                    return 1 + 2        = 3
    # delta_1 = 2 + 2 / 2 - 1 = 2,         advantage 2 + 1 / 4 = 2.25,     return 2.25 + 1     = 3.25
    # delta_0 = 1 + 1 / 2 - 1 / 2 = 1,     advantage 1 + 2.25 / 4,         return 1.5625 + 0.5 = 2.0625
    advantages, returns = gae(REWARDS, VALUES, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.5625, 2.25, 1.0]]
    assert returns.tolist() == [[2.0625, 3.25, 3.0]]


def test_a_masked_token_is_skipped_by_hand() -> None:
    # without the middle token: delta_0 = 1 + 2 / 2 - 1 / 2 = 1.5 takes the value of the NEXT LIVE token, and
    # advantage_0 = 1.5 + 1 / 4 carries the trace over the hole
    advantages, returns = gae(REWARDS, VALUES, torch.tensor([[1, 0, 1]]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.75, 0.0, 1.0]]
    assert returns.tolist() == [[2.25, 0.0, 3.0]]


def test_past_the_last_live_token_the_value_is_zero_by_hand() -> None:
    # delta_1 = 2 - 1 = 1; delta_0 = 1 + 1 / 2 - 1 / 2 = 1, advantage 1 + 1 / 4
    advantages, returns = gae(REWARDS, VALUES, torch.tensor([[1, 1, 0]]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.25, 1.0, 0.0]]
    assert returns.tolist() == [[1.75, 2.0, 0.0]]


@pytest.mark.parametrize("rubbish", [7.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("padding", [0, 3, 3000])
def test_the_padding_behind_a_cut_response_by_hand(padding: int, rubbish: float) -> None:
    # advantage_2 = 1 - 0.6 = 0.4, advantage_1 = 0.6 - 0.4 + 0.95 * 0.4, advantage_0 = 0.4 - 0.2 + 0.95 * 0.58
    def padded(*tokens: float) -> torch.Tensor:
        return torch.nn.functional.pad(torch.tensor([tokens]), (0, padding), value=rubbish)

    mask = (torch.arange(3 + padding) < 3)[None]
    results = gae(padded(0.0, 0.0, 1.0), padded(0.2, 0.4, 0.6), mask)
    for result, by_hand in zip(results, ([0.751, 0.58, 0.4], [0.951, 0.98, 1.0]), strict=True):
        torch.testing.assert_close(result[0, :3], torch.tensor(by_hand))
        assert (result[0, 3:] == 0).all()
    narrow = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.4, 0.6]]))
    assert all(torch.equal(result[:, :3], alone) for result, alone in zip(results, narrow, strict=True))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_live_token_among_rubbish_by_hand(place: int) -> None:
    """Alone it is its own mean, so that whitening leaves 0; its return is its reward."""
    rewards = torch.tensor([[float("nan"), float("inf"), 1e30]])
    values = torch.tensor([[1e30, float("nan"), -float("inf")]])
    rewards[0, place], values[0, place] = 1.0, 0.0
    mask = torch.arange(3)[None] == place
    advantages, returns = gae(rewards, values, mask, whiten=True)
    assert advantages.tolist() == [[0.0, 0.0, 0.0]]
    assert returns.tolist() == [mask[0].tolist()]
    assert gae(rewards, values, mask)[0].tolist() == [mask[0].tolist()]


def test_defaults_are_gamma_1_and_lambda_095() -> None:
    advantages, _ = gae(REWARDS, VALUES)
    expected = by_definition([1.0, 2.0, 3.0], [0.5, 1.0, 2.0], 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([expected]))


@every_example
@given(seed=seeds, rows=st.integers(0, 4), length=st.integers(0, 7), gamma=unit, lam=unit)
def test_against_the_definition(seed: int, rows: int, length: int, gamma: float, lam: float) -> None:
    rewards, values, mask = sample(seed, rows, length)
    poison = torch.where(mask, 0.0, torch.nan)
    advantages, returns = gae(rewards + poison, values + poison, mask, gamma=gamma, lam=lam)

    expected = torch.zeros(rows, length, dtype=torch.float64)
    for row in range(rows):
        live = mask[row]
        truth = by_definition(rewards[row, live].tolist(), values[row, live].tolist(), gamma, lam)
        expected[row, live] = torch.tensor(truth, dtype=torch.float64)
    torch.testing.assert_close(advantages, expected.float(), rtol=1e-5, atol=1e-5)
    expected_returns = torch.where(mask, expected + values, 0.0)
    torch.testing.assert_close(returns, expected_returns.float(), rtol=1e-5, atol=1e-5)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@every_example
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 6), max_size=5),
    bounds_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_packed_is_padded_is_compacted(seed: int, lengths: list[int], bounds_dtype: torch.dtype) -> None:
    rewards, values, mask = sample(seed, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    arguments = {"gamma": 0.9, "lam": 0.8}
    poison = torch.where(mask, 0.0, torch.nan)
    packed = gae(rewards + poison, values + poison, mask, cu_seqlens=bounds.to(bounds_dtype), **arguments)

    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        live = mask[start:stop]
        padded = gae(rewards[None, start:stop], values[None, start:stop], live[None], **arguments)
        compact = gae(rewards[None, start:stop][:, live], values[None, start:stop][:, live], **arguments)
        for ours, padded_part, compact_part in zip(packed, padded, compact, strict=True):
            torch.testing.assert_close(ours[start:stop], padded_part[0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(ours[start:stop][live], compact_part[0], rtol=1e-6, atol=1e-6)
            assert (ours[start:stop][~live] == 0).all()


@settings(every_example, max_examples=20)
@given(
    seed=seeds,
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    live_share=st.sampled_from([0.5, 0.99, 1.0]),
    gamma=unit,
    lam=unit,
)
def test_long_sequences_against_a_loop(
    seed: int, lengths: list[int], live_share: float, gamma: float, lam: float
) -> None:
    rewards, values, _ = sample(seed, sum(lengths))
    mask = torch.rand(sum(lengths), generator=seeded(seed)) < live_share
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed, _ = gae(rewards, values, mask, cu_seqlens=bounds, gamma=gamma, lam=lam)
    inside = torch.arange(max(lengths)) < bounds.diff()[:, None]
    padded = (x.new_zeros(inside.shape).masked_scatter(inside, x) for x in (rewards, values, mask))
    from_padded, _ = gae(*padded, gamma=gamma, lam=lam)

    expected = torch.zeros_like(from_padded, dtype=torch.float64)
    for row, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        value = advantage = 0.0
        for t in reversed(range(start, stop)):
            if mask[t]:
                advantage = rewards[t].item() + gamma * value - values[t].item() + gamma * lam * advantage
                value = values[t].item()
                expected[row, t - start] = advantage
    torch.testing.assert_close(from_padded, expected.float(), rtol=1e-5, atol=1e-4)  # sums of up to 400 tokens
    assert torch.equal(packed, torch.cat([row[:length] for row, length in zip(from_padded, lengths, strict=True)]))


@pytest.mark.parametrize("lengths", [[3, 0, 1500, 1], [0, 0, *[1, 1100, 0, 5] * 9, 2048, 0]], ids=["few", "many"])
def test_packed_past_a_block_and_beside_an_empty_sequence(lengths: list[int]) -> None:
    rewards, values, mask = sample(5, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = gae(rewards, values, mask, gamma=0.9, lam=0.8, cu_seqlens=bounds)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        one = (x[None, start:stop].double() for x in (rewards, values))
        for ours, alone in zip(packed, gae(*one, mask[None, start:stop], gamma=0.9, lam=0.8), strict=True):
            torch.testing.assert_close(ours[start:stop].double(), alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_bounds_of_any_integer_dtype_and_stride(dtype: torch.dtype) -> None:
    rewards, values, mask = sample(10, 12)
    expected = gae(rewards, values, mask, cu_seqlens=torch.tensor([0, 5, 5, 12]))
    strided = torch.tensor([0, 99, 5, 99, 5, 99, 12])[::2]
    for bounds in (strided.to(dtype), strided):
        got = gae(rewards, values, mask, cu_seqlens=bounds)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_row_alone_is_bitwise_the_row_in_a_batch() -> None:
    rewards, values, mask = sample(5, 6, 33)
    whole = gae(rewards, values, mask)
    for row in range(6):
        alone = gae(rewards[row : row + 1], values[row : row + 1], mask[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))


def test_strided_inputs_give_the_same_bits() -> None:
    rewards, values, mask = sample(6, 4, 9)
    expected = gae(rewards, values, mask)
    wide = torch.full((4, 18), torch.nan)
    wide[:, ::2] = values
    got = gae(rewards.T.contiguous().T, wide[:, ::2], mask.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    expanded = gae(rewards[:1].expand(4, 9), values, mask)
    copied = gae(rewards[:1].repeat(4, 1), values, mask)
    assert all(torch.equal(a, b) for a, b in zip(expanded, copied, strict=True))
    bounds = torch.tensor([0, 4, 9])
    packed = gae(wide[0, ::2], wide[1, ::2], cu_seqlens=bounds)
    assert all(torch.equal(a, b) for a, b in zip(packed, gae(values[0], values[1], cu_seqlens=bounds), strict=True))


def test_nan_in_a_live_token_reaches_the_tokens_before_it_and_no_other_sequence() -> None:
    rewards, values, _ = sample(7, 3, 4)
    clean, _ = gae(rewards, values)
    rewards[1, 2] = torch.nan
    hit = torch.zeros(3, 4, dtype=torch.bool)
    hit[1, :3] = True
    advantages, returns = gae(rewards, values)
    assert torch.equal(torch.isnan(advantages), hit) and torch.equal(torch.isnan(returns), hit)
    assert torch.equal(advantages[~hit], clean[~hit])
    packed, _ = gae(rewards.reshape(-1), values.reshape(-1), cu_seqlens=torch.tensor([0, 4, 8, 12]))
    assert torch.equal(torch.isnan(packed), hit.reshape(-1))


def test_whitening_comes_after_the_returns() -> None:
    rewards, values, mask = sample(8, 4, 9)
    plain, returns = gae(rewards, values, mask)
    advantages, returns_too = gae(rewards, values, mask, whiten=True)
    live = plain[mask].double()
    truth = (live - live.mean()) / (live.var() + 1e-8).sqrt()
    torch.testing.assert_close(advantages[mask], truth.float())
    assert (advantages[~mask] == 0).all()
    assert torch.equal(returns, returns_too)
    torch.testing.assert_close(returns, torch.where(mask, plain + values, 0.0))
    assert torch.equal(advantages, masked_whiten(plain, mask))


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (3, 4)])
def test_empty_and_all_masked(shape: tuple[int, int], whiten: bool) -> None:
    nothing = torch.full(shape, torch.nan)
    for result in gae(nothing, nothing, torch.zeros(shape), whiten=whiten):
        assert torch.equal(result, torch.zeros(shape))


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]])
def test_empty_packed(bounds: list[int], whiten: bool) -> None:
    for result in gae(torch.empty(0), torch.empty(0), cu_seqlens=torch.tensor(bounds), whiten=whiten):
        assert result.shape == (0,)


def test_targets_carry_no_gradient() -> None:
    rewards, values = REWARDS.clone().requires_grad_(), VALUES.clone().requires_grad_()
    assert not any(result.requires_grad for result in gae(rewards, values, whiten=True))


def test_dtypes() -> None:
    expected = gae(REWARDS, VALUES, gamma=0.5, lam=0.5)
    for dtype in (torch.bfloat16, torch.float16):
        for got, wanted in zip(gae(REWARDS.to(dtype), VALUES, gamma=0.5, lam=0.5), expected, strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, wanted)  # the numbers are exact in every dtype
    # 2^-24 is lost beside 1 in half and single precision, and kept in double
    advantages, _ = gae(REWARDS.double() + 2**-30, VALUES.double(), gamma=0.5, lam=0.5)
    assert advantages.dtype == torch.float64 and advantages[0, 2].item() == 1 + 2**-30


@pytest.mark.parametrize("cu_seqlens", [None, [0, 2, 6]])
def test_the_reference_is_a_proper_custom_op(cu_seqlens: list[int] | None) -> None:
    rewards, values, mask = sample(9, *((2, 3) if cu_seqlens is None else (6,)))
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    torch.library.opcheck(torch.ops.rlhf_fast.gae_torch, (rewards, values, mask, bounds, 0.9, 0.8))


def test_bad_arguments() -> None:
    flat = torch.zeros(3)
    with pytest.raises(ValueError, match=r"rewards must be \(B, T\).*got shape \(3,\) without cu_seqlens"):
        gae(flat, flat)
    with pytest.raises(ValueError, match=r"got shape \(1, 3\) with cu_seqlens"):
        gae(REWARDS, VALUES, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"values must have shape \(1, 3\)"):
        gae(REWARDS, VALUES[:, :2])
    with pytest.raises(ValueError, match=r"mask must have shape \(1, 3\)"):
        gae(REWARDS, VALUES, torch.ones(3))
    with pytest.raises(TypeError, match="values must be float64"):
        gae(REWARDS, VALUES.long())
    with pytest.raises(ValueError, match="one device"):
        gae(REWARDS, VALUES.to("meta"))
    for name in ("gamma", "lam"):
        for number in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\]; got"):
                gae(REWARDS, VALUES, **{name: number})


@pytest.mark.parametrize("bounds", [[1, 3], [0, 2], [0, 4], [0, 2, 1, 3], [0, 5, 3], [-1, 3], [3, 0]])
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_bounds(bounds: list[int], compiled: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = torch.compile(gae, fullgraph=True, backend="aot_eager") if compiled else gae
    if backend in GPU_BACKENDS:
        monkeypatch.setattr(sys.modules["rlhf_fast.ops.gae"], "check_bounds", lambda *_: None)  # of CPU tensors
        results = function(torch.zeros(3), torch.zeros(3), cu_seqlens=torch.tensor(bounds))
        assert all(result.isnan().all() for result in results)
        return
    with pytest.raises(ValueError, match="must start at 0, never decrease and end at the number of tokens, 3"):
        function(torch.zeros(3), torch.zeros(3), cu_seqlens=torch.tensor(bounds))


def test_bounds_of_the_wrong_kind() -> None:
    for bounds in (torch.tensor([[0, 3]]), torch.empty(0, dtype=torch.int64), torch.tensor(3)):
        with pytest.raises(ValueError, match=r"cu_seqlens must have shape \(B \+ 1,\)"):
            gae(torch.zeros(3), torch.zeros(3), cu_seqlens=bounds)
    with pytest.raises(TypeError, match="cu_seqlens must hold integers"):
        gae(torch.zeros(3), torch.zeros(3), cu_seqlens=torch.tensor([0.0, 3.0]))
