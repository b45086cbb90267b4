"""The engine's attention over packed sequences, on every path of this processor."""

import itertools

import pytest
import torch
from torch import Tensor

from rlhf_fast.ops import can_attend, short_attention, use_backend
from rlhf_fast.ops._short_attention import Inputs

pytestmark = pytest.mark.usefixtures("cpu_path")
# gap to float64, of the largest value
NEAR = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def inputs(
    lengths: list[int], heads: int, shared: int, widths: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32
) -> Inputs:
    """Heads lie between the tokens, as after a projection, with NaN around."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, width: int) -> Tensor:
        wide = torch.full((sum(lengths), count, width + 3), torch.nan, dtype=dtype)
        wide[..., :width] = torch.randn(sum(lengths), count, width, generator=generator)
        return wide[..., :width].transpose(0, 1).requires_grad_()

    longest = max(lengths)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    mask = torch.ones(longest, longest, dtype=torch.bool).tril()
    return Inputs(rows(heads, widths[0]), rows(shared, widths[0]), rows(shared, widths[1]), mask, starts, 0.3)


def exact(given: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """By the formula in float64: out, and the leaves query, key, value."""
    leaves = tuple(tensor.detach().double().requires_grad_() for tensor in given[:3])
    query, key, value = leaves
    group, pieces = query.shape[0] // key.shape[0], []
    for start, stop in itertools.pairwise(given.starts.tolist()):
        q, k, v = (tensor[:, start:stop] for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(group, dim=0) for tensor in (k, v))
        scores = (given.scale * q @ k.transpose(1, 2)).masked_fill(
            ~given.mask[: stop - start, : stop - start], -torch.inf
        )
        pieces.append((scores.softmax(2) @ v).transpose(0, 1))
    return torch.cat(pieces), leaves


@pytest.mark.parametrize("dtype", list(NEAR), ids=str)
@pytest.mark.parametrize(
    "shape", [((5, 1, 17), 4, 2, (16, 16)), ((43, 30, 64), 9, 3, (64, 64)), ((3, 19), 6, 6, (20, 7))]
)
def test_float64_truth(shape: tuple, dtype: torch.dtype) -> None:
    lengths, heads, shared, widths = shape
    given = inputs(list(lengths), heads, shared, widths, dtype)
    ours, (expected, leaves) = short_attention(*given), exact(given)
    assert ours.dtype == dtype and ours.shape == (sum(lengths), heads, widths[1])
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = (ours, *torch.autograd.grad(ours, given[:3], upstream))
    truth = (expected, *torch.autograd.grad(expected, leaves, upstream.double()))
    for x, y in zip(found, truth, strict=True):
        assert (x.double() - y).abs().max() <= NEAR[dtype] * y.abs().max()


def test_later_tokens_and_other_sequences_change_nothing() -> None:
    given = inputs([6, 4], 4, 2)
    clean = short_attention(*given).detach()
    with torch.no_grad():
        given.key[:, 5] += 100
        given.value[:, 5] -= 7
        given.query[:, 6:] = torch.nan
    ours = short_attention(*given)
    assert torch.equal(ours[:5], clean[:5]) and not torch.equal(ours[5], clean[5]) and ours[6:].isnan().all()
    grads = torch.autograd.grad(ours[:5].sum(), given[:3])
    assert all(grad[:, :5].isfinite().all() and not grad[:, 5].any() for grad in grads)


def test_any_number_of_threads_and_a_sequence_alone() -> None:
    given = inputs([9, 33, 2, 20], 6, 2)
    outputs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        ours = short_attention(*given)
        outputs.append((ours, *torch.autograd.grad(ours.sum(), given[:3])))
    assert all(torch.equal(x, y) for other in outputs[1:] for x, y in zip(outputs[0], other, strict=True))
    rows = slice(9, 42)
    alone = given._replace(
        query=given.query[:, rows], key=given.key[:, rows], value=given.value[:, rows], starts=torch.tensor([0, 33])
    )
    assert torch.equal(short_attention(*alone), outputs[0][0][rows])


def test_only_wanted_gradients_and_no_second_ones() -> None:
    given = inputs([4, 3], 2, 2)
    given = given._replace(key=given.key.detach(), query=given.query.detach())
    ours = short_attention(*given)
    (grad,) = torch.autograd.grad(ours.sum(), given.value, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_compiled_and_faked() -> None:
    given = inputs([5, 8], 4, 2)
    compiled = torch.compile(lambda *fields: short_attention(*fields) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), short_attention(*given) + 1)


def test_who_computes_it() -> None:
    assert can_attend(torch.ones(1)) and can_attend(torch.ones(1).bfloat16())
    assert not can_attend(torch.ones(1).double()) and not can_attend(torch.ones(1, device="meta"))
    with use_backend("torch"):
        assert not can_attend(torch.ones(1))
