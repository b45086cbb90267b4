"""How the CUDA kernels cut rows of logits: on and beside the edges of vectors and segments, at any address.

They run emulated where there is no GPU. The edge contract and the vocabularies of real models run on them too.
"""

from typing import Any

import pytest
import torch
from devices import seeded, why_not
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels import records
from rlhf_fast.ops._dispatch import launch
from rlhf_fast.ops._rows import NOTHING, logits_of, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_cuda"),
    pytest.mark.skipif(why_not("cuda") is not None, reason=str(why_not("cuda"))),
]

# the fixture only forces a backend, so all examples can share it
some_examples = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
row_counts = st.integers(1, 3)
# of a vector, a block's vectors side by side and a segment: below, on and above
EDGES = sorted({edge + step for edge in (4, 8, 1024, 2048, 8192, 16384) for step in (-1, 0, 1)})
vocabularies = st.one_of(st.integers(1, 300), st.sampled_from(EDGES))
# columns before the first row and between two
leads, gaps = st.integers(0, 8), st.integers(0, 9)
MANY = 33 * 8192 + 5  # columns: more segments than a warp has lanes
softcaps = st.sampled_from([None, 3.0])
temperatures = st.sampled_from([0.7, 1.0, 1.3])


def placed(x: Tensor, lead: int, gap: int) -> Tensor:
    """The same numbers at another address, with NaN around every row."""
    rows, columns = x.shape
    memory = x.new_full((lead + rows * (columns + gap) + 8,), torch.nan)
    return memory.as_strided(x.shape, (columns + gap, 1), lead).copy_(x)


def around(x: Tensor) -> Tensor:
    """The memory around the rows of ``placed``."""
    lead, (rows, columns) = x.storage_offset(), x.shape
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).clone()
    for row in range(rows):
        memory[lead + row * x.stride(0) :][:columns] = torch.nan
    return memory


def sample(seed: int, rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Logits with NaN in dead rows, targets and mask, and three vectors of numbers."""
    generator = seeded(seed)
    mask = torch.rand(rows, generator=generator) < 0.8
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    numbers = torch.randn(3, rows, generator=generator)
    return logits.to(dtype).masked_fill(~mask[:, None], torch.nan), targets, mask, list(numbers)


def close(ours: list[Tensor], truth: list[Tensor], largest: float = 1.0) -> None:
    """The last is a gradient. ``largest``: the size of the terms whose differences it is made of, if above 1."""
    for mine, true in zip(ours[:-1], truth[:-1], strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=2e-6, atol=4e-6)
    eps = torch.finfo(ours[-1].dtype).eps
    torch.testing.assert_close(ours[-1].double(), truth[-1], rtol=eps + 2e-5, atol=3e-6 * max(largest, 1.0))


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@some_examples
@given(seeds, row_counts, vocabularies, dtypes, leads, gaps, softcaps, temperatures, st.integers(0, 9))
def test_masked_logprobs(
    seed: int, rows: int, vocab: int, dtype: torch.dtype, lead: int, gap: int, softcap: float | None,
    temperature: float, padding: int,
) -> None:  # fmt: skip
    logits, targets, mask, (weight, entropy_weight, _) = sample(seed, rows, vocab, dtype)
    logits = torch.cat([logits, logits.new_full((rows, padding), torch.nan)], dim=1)

    def run(logits: Tensor, inplace: bool = False) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        outputs = ops.masked_logprobs(
            leaf, targets, mask, temperature=temperature, softcap=softcap, vocab_size=vocab, return_entropy=True,
            inplace_backward=inplace,
        )  # fmt: skip
        loss = (outputs[0] * weight + outputs[1] * entropy_weight).sum()
        return [x.detach().clone() for x in (*outputs, *torch.autograd.grad(loss, leaf))]

    got = run(logits)
    close(got, run(logits.double()))
    same(run(placed(logits, lead, gap)), got)
    memory = placed(logits, lead, gap)
    same(run(memory, inplace=True), got)
    same([memory], got[-1:])
    assert around(memory).isnan().all()


@some_examples
@given(seeds, row_counts, vocabularies, dtypes, leads, gaps, leads, gaps, temperatures)
@example(2, 1, MANY, torch.bfloat16, 1, 0, 2, 0, 1.0)
@example(285, 1, 16384, torch.float32, 0, 0, 0, 0, 0.7)  # one column has most of the probability, and the KL is large
def test_exact_kl(
    seed: int, rows: int, vocab: int, dtype: torch.dtype, lead: int, gap: int, ref_lead: int, ref_gap: int,
    temperature: float,
) -> None:  # fmt: skip
    logits, _, mask, (weight, *_) = sample(seed, rows, vocab, dtype)
    ref_logits = sample(seed + 1, rows, vocab, dtype)[0]

    def run(logits: Tensor, ref_logits: Tensor) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        kl = ops.exact_kl(leaf, ref_logits, mask, temperature=temperature)
        return [kl.detach(), *torch.autograd.grad((kl * weight).sum(), leaf)]

    ref_logits = torch.where(mask[:, None], ref_logits.nan_to_num(), torch.nan)
    got = run(logits, ref_logits)
    truth = run(logits.double(), ref_logits.double())
    close(got, truth, largest=truth[0].max().item())
    same(run(placed(logits, lead, gap), placed(ref_logits, ref_lead, ref_gap)), got)
    assert (run(logits, logits)[0] == 0).all()


# the launchers, and after a space what makes a variant
FOLDS = ("linear_logprobs", "linear_policy_loss", "linear_policy_loss exact", "linear_policy_ref")
RESULTS = {"linear_policy_loss exact": 3, "linear_policy_ref": 4}  # the others have 2


def fold(
    launcher: str, logits: Tensor, ref_logits: Tensor, targets: Tensor, mask: Tensor, numbers: list[Tensor],
    grad: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """What the launcher makes of each row, and the gradient."""
    rows, vocab = logits.shape
    shared = {
        "rows": rows_of(rows, targets, mask, None, 0.9, vocab=vocab, softcap=5.0),
        "logits": logits_of(logits),
        "grad": NOTHING if grad is None else logits_of(grad),
    }
    outputs = [torch.full((rows,), torch.nan) for _ in range(RESULTS.get(launcher, 2))]
    if launcher == "linear_logprobs":
        names = ("grad_logprobs", "grad_entropy", "grad_logsumexp")
        record: Any = records.LinearLogprobs(
            **shared, **dict(zip(names, numbers[:3], strict=True)), outputs=records.RowOutputs(*outputs)
        )
    elif launcher.startswith("linear_policy_loss"):
        exact = launcher.endswith("exact")
        terms = records.PolicyTerms(clip_low=0.2, clip_high=0.2, kl_coef=0.1, entropy_coef=0.01, kl=2, kl_slope=2)
        record = records.LinearPolicyLoss(
            **shared, ref_logits=logits_of(ref_logits) if exact else NOTHING, old_logprobs=numbers[0],
            advantages=numbers[1], ref_logprobs=None if exact else numbers[2], share=torch.full((rows,), 0.5),
            terms=terms, logprobs=outputs[0], entropy=outputs[1], kl=outputs[2] if exact else None,
        )  # fmt: skip
    else:
        names = ("logprobs", "ref_logprobs", "entropy", "kl", "grad_logprobs", "grad_entropy", "grad_kl")
        given = dict(zip(names, [*outputs, *numbers], strict=True))
        record = records.LinearPolicyRef(**shared, **given, ref_logits=logits_of(ref_logits))
    launch(record, logits)
    return outputs if grad is None else [*outputs, grad]


@pytest.mark.parametrize("launcher", FOLDS)
@some_examples
@given(seeds, row_counts, vocabularies, leads, gaps, leads, gaps)
def test_a_fold_in_place_and_elsewhere(
    launcher: str, seed: int, rows: int, vocab: int, lead: int, gap: int, other_lead: int, other_gap: int
) -> None:
    logits, targets, mask, numbers = sample(seed, rows, vocab, torch.float32)
    ref_logits = torch.where(mask[:, None], sample(seed + 1, rows, vocab, torch.float32)[0].nan_to_num(), torch.nan)
    plain = fold(launcher, logits, ref_logits, targets, mask, numbers, torch.full_like(logits, torch.nan))
    assert all(x.isfinite().all() and (x[~mask] == 0).all() for x in plain)
    same(fold(launcher, logits, ref_logits, targets, mask, numbers, None), plain[:-1])
    memory = placed(logits, lead, gap)
    same(fold(launcher, memory, placed(ref_logits, other_lead, other_gap), targets, mask, numbers, memory), plain)
    assert around(memory).isnan().all()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grad = placed(torch.zeros_like(logits, dtype=dtype), other_lead, other_gap)
        rounded = [*plain[:-1], plain[-1].to(dtype)]
        same(fold(launcher, placed(logits, lead, gap), ref_logits, targets, mask, numbers, grad), rounded)
        assert around(grad).isnan().all()


@some_examples
@given(seeds, row_counts, vocabularies)
@example(2, 1, MANY)
def test_the_fold_of_log_probs(seed: int, rows: int, vocab: int) -> None:
    logits, targets, mask, numbers = sample(seed, rows, vocab, torch.float32)
    got = fold("linear_logprobs", logits, logits, targets, mask, numbers, torch.empty_like(logits))
    leaf = logits.double().requires_grad_()
    truth = ops.masked_logprobs(leaf, targets, mask, temperature=0.9, softcap=5.0, return_statistics=True)[:3]
    loss = sum((output * number).sum() for output, number in zip(truth, numbers, strict=True))
    close(got, [*truth[:2], *torch.autograd.grad(loss, leaf)])


@pytest.mark.parametrize("launcher", FOLDS)
@pytest.mark.parametrize("wrong", [-1, 20, 2**40, -(2**40)])
def test_a_target_that_nobody_has_checked_is_nan_in_its_row(launcher: str, wrong: int) -> None:
    logits, targets, _, numbers = sample(3, 3, 20, torch.float32)
    mask = torch.ones(3, dtype=torch.bool)
    logits = logits.nan_to_num()
    right = fold(launcher, logits, logits, targets, mask, numbers, torch.empty_like(logits))
    targets[1] = wrong
    found = fold(launcher, logits, logits, targets, mask, numbers, torch.empty_like(logits))
    assert found[0].isnan().tolist() == found[-1].isnan().all(dim=1).tolist() == [False, True, False]
    same([x[::2] for x in found], [x[::2] for x in right])


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_row_of_many_is_a_row_of_few(softcap: float | None) -> None:
    """One block walks through each of many rows; of few rows, each segment has a block. The bits are the same."""
    rows, few = 130, slice(0, 100)
    logits, targets, mask, _ = sample(1, rows, 4 * 8192 + 100, torch.bfloat16)
    for wanted in ("return_entropy", "return_statistics"):
        options: Any = {"softcap": softcap, "temperature": 0.8, wanted: True}
        of_many = ops.masked_logprobs(logits, targets, mask, **options)
        of_few = ops.masked_logprobs(logits[few], targets[few], mask[few], **options)
        same([each[few] for each in of_many], list(of_few))
    of_many = ops.exact_kl(logits, logits.flip(0).nan_to_num(), mask)
    of_few = ops.exact_kl(logits[few], logits.flip(0).nan_to_num()[few], mask[few])
    same([of_many[few]], [of_few])
