import pytest
import torch
from devices import seeded

from rlhf_fast.ops import aggregate
from rlhf_fast.ops._aggregate import AGGREGATIONS
from rlhf_fast.ops.clipped_value_loss import clipped_value_loss

pytestmark = pytest.mark.usefixtures("backend")


def sample(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """values, old_values, returns, mask; many of the values further than 0.2 from the old ones."""
    generator = seeded(seed)
    old_values, noise, returns = torch.randn(3, *shape, generator=generator, dtype=dtype).unbind()
    return old_values + 0.5 * noise, old_values, returns, torch.rand(shape, generator=generator) < 0.7


def test_by_hand() -> None:
    # old 1, clip 0.2: the clipped branch limits a value to 0.8 .. 1.2
    # v:          1.5      1.5      1.1      0.5      0.5
    # R:          0        2        2        2        0
    # (v - R)^2:  2.25     0.25     0.81     2.25     0.25
    # clipped:    1.44     0.64*    0.81     1.44     0.64*    * the greater: gradient 0
    # d / dv:     1.5      0       -0.9     -1.5      0
    values = torch.tensor([1.5, 1.5, 1.1, 0.5, 0.5], requires_grad=True)
    result = clipped_value_loss(values, torch.ones(5), torch.tensor([0.0, 2.0, 2.0, 2.0, 0.0]))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.5 * (2.25 + 0.64 + 0.81 + 2.25 + 0.64) / 5, rel=1e-6)
    torch.testing.assert_close(values.grad, torch.tensor([1.5, 0.0, -0.9, -1.5, 0.0]) / 5)
    assert result.clip_fraction.item() == pytest.approx(2 / 5)


def test_without_a_clip_by_hand() -> None:
    values = torch.tensor([1.5, 0.5], requires_grad=True)
    result = clipped_value_loss(values, torch.ones(2), torch.tensor([0.0, 2.0]), clip=None)
    result.loss.backward()
    assert result.loss.item() == 0.5 * (2.25 + 2.25) / 2
    assert values.grad.tolist() == [0.75, -0.75]
    assert result.clip_fraction.item() == 0


def test_a_tie_between_the_branches_counts_as_unclipped() -> None:
    # v = 2 and its clipped 1.5 are equally far from 1.75: the gradient is that of v, whole, not half of it
    values = torch.tensor([2.0], requires_grad=True)
    result = clipped_value_loss(values, torch.tensor([1.0]), torch.tensor([1.75]), clip=0.5)
    result.loss.backward()
    assert values.grad.item() == 0.25 and result.clip_fraction.item() == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("num_items", [None, 5])
def test_aggregation_of_the_token_losses(aggregation: str, num_items: int | None) -> None:
    values, old_values, returns, mask = sample(1, 3, 5)
    result = clipped_value_loss(values, old_values, returns, mask, aggregation=aggregation, num_items=num_items)
    losses = torch.empty(3, 5)
    for i in range(3):
        for j in range(5):
            v, old, target = (tensor[i, j].item() for tensor in (values, old_values, returns))
            losses[i, j] = 0.5 * max((v - target) ** 2, (min(max(v, old - 0.2), old + 0.2) - target) ** 2)
    expected = aggregate(losses, mask, aggregation=aggregation, num_items=num_items)  # by hand in test_aggregate
    torch.testing.assert_close(result.loss, expected)


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck(aggregation: str, clip: float | None) -> None:
    values, *rest = sample(2, 3, 5, dtype=torch.float64)
    arguments = {"aggregation": aggregation, "clip": clip}
    if clip is not None:
        assert 0 < clipped_value_loss(values, *rest, **arguments).clip_fraction < 1  # both branches are checked
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, *rest, **arguments).loss, values.requires_grad_())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_masked_tokens_are_not_read(aggregation: str, poison: float) -> None:
    *tensors, mask = sample(3, 3, 5)
    results, gradients = [], []
    for filler in (0.0, poison):
        filled = [torch.where(mask, tensor, filler) for tensor in tensors]
        leaf = filled[0].requires_grad_()
        results.append(clipped_value_loss(*filled, mask, aggregation=aggregation))
        results[-1].loss.backward()
        gradients.append(leaf.grad)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(*gradients)
    assert (gradients[1][~mask] == 0).all() and (gradients[1][mask] != 0).any()


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 3)])
def test_empty_and_all_masked(aggregation: str, shape: tuple[int, int], clip: float | None) -> None:
    values = torch.full(shape, torch.nan, requires_grad=True)
    zeros = torch.zeros(shape)
    result = clipped_value_loss(values, zeros, zeros, zeros, clip=clip, aggregation=aggregation)
    result.loss.backward()
    assert [number.item() for number in result] == [0.0, 0.0]
    assert torch.equal(values.grad, zeros)


def test_empty_flat() -> None:
    empty = torch.empty(0, requires_grad=True)
    result = clipped_value_loss(empty, empty, empty)
    result.loss.backward()
    assert result.loss.item() == 0 and empty.grad.shape == (0,)


@pytest.mark.parametrize("poisoned", range(3))
def test_a_live_nan_shows_in_the_loss(poisoned: int) -> None:
    tensors = [torch.ones(3) for _ in range(3)]
    tensors[poisoned][1] = torch.nan
    assert torch.isnan(clipped_value_loss(*tensors).loss) == (poisoned != 1)  # an old value only clips
    assert torch.isnan(clipped_value_loss(*tensors, clip=None).loss) == (poisoned != 1)


def test_only_the_loss_and_only_values_have_a_gradient() -> None:
    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    result = clipped_value_loss(*tensors)
    result.loss.backward()
    assert [tensor.grad is None for tensor in tensors] == [False, True, True]
    assert [number.requires_grad for number in result] == [True, False]
    with torch.no_grad():
        assert clipped_value_loss(*tensors).loss.grad_fn is None


def test_strides_dtypes_and_shapes() -> None:
    *tensors, mask = sample(4, 4, 6)
    half = [tensor.bfloat16() for tensor in tensors]
    expected = clipped_value_loss(*(tensor.float() for tensor in half), mask)
    transposed = [tensor.T.contiguous().T for tensor in half]
    flat = [tensor.reshape(-1) for tensor in half]
    for views, mask_view in ((half, mask), (transposed, mask.T.contiguous().T), (flat, mask.reshape(-1))):
        got = clipped_value_loss(*views, mask_view)
        assert all(number.dtype == torch.float32 for number in got)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    expanded = clipped_value_loss(tensors[0], tensors[1], tensors[2][:, :1].expand(4, 6), mask)
    copied = clipped_value_loss(tensors[0], tensors[1], tensors[2][:, :1].repeat(1, 6), mask)
    assert torch.equal(expanded.loss, copied.loss)
    assert clipped_value_loss(tensors[0].double(), *tensors[1:], mask).loss.dtype == torch.float64


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clip must be a finite number > 0"):
            clipped_value_loss(x, x, x, clip=clip)
    with pytest.raises(ValueError, match=r"'seq-mean-token-mean' needs \(B, T\)"):
        clipped_value_loss(x[0], x[0], x[0], aggregation="seq-mean-token-mean")
    with pytest.raises(ValueError, match=r"returns must have shape \(2, 3\).*got \(2,\)"):
        clipped_value_loss(x, x, x[:, 0])
    with pytest.raises(ValueError, match="mask must have shape"):
        clipped_value_loss(x, x, x, x[0])
    with pytest.raises(TypeError, match="values must be float64"):
        clipped_value_loss(x.long(), x, x)
    with pytest.raises(ValueError, match="one device"):
        clipped_value_loss(x, x.to("meta"), x)
