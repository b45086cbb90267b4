"""The compiled engine as a whole, on every path of this processor: the edge contract runs on its best one alone.

Its vector functions are in test_vectors.py.
"""

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from op_table import LAYER_OPS, LAYERS, OPS, Case, H, Op, V, make, outputs_and_grads
from test_accuracy import no_worse_than_naive
from test_layers import near_the_truth, wide
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import _products
from rlhf_fast.ops._dispatch import implementation
from rlhf_fast.ops._rows import Tokens
from rlhf_fast.ops.masked_logprobs import Inputs

every_op = pytest.mark.parametrize("op", [*OPS, *LAYER_OPS], ids=lambda op: op.name)
token_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
row_wise_op = pytest.mark.parametrize("op", [op for op in OPS if op.row_wise], ids=lambda op: op.name)
HALVES = (torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)

pytestmark = pytest.mark.usefixtures("cpu_path")

VOCAB = 4111  # two blocks of a row and a rest one short of whole vectors
HIDDEN = 96  # float32 products of thin or odd factors depend on the number of threads, in MKL


def sizeable(op: Op, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Enough work for every launcher, and every matrix product, to share it over threads."""
    if not op.has_vocabulary:
        return make(op, (21, 2049), dtype, seed)
    data, shared = (
        {name: tuple(HIDDEN if length == H else length for length in size) for name, size in sizes.items()}
        for sizes in (op.data, op.shared)
    )
    return make(replace(op, data=data, shared=shared), (4, 9), dtype, seed, VOCAB)


def results(op: Op, case: Case) -> list[Tensor]:
    outputs, grads = outputs_and_grads(op.run, op, case, case.mask)
    return [*outputs, *grads.values()]


def same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@token_op
@every_dtype
def test_float64_truth(op: Op, dtype: torch.dtype) -> None:
    """Rows that end at, after and before the end of a vector, and of a block of the vocabulary or of tokens."""
    sizes = [((2, 3), vocab) for vocab in (2048, 2049, VOCAB)]
    if not op.has_vocabulary:
        sizes = [((1, 1024), V), ((1, 1025), V), ((3, 1029), V)]
    for shape, vocab in sizes:
        case = make(op, shape, dtype, vocab=vocab)
        if op.name == "linear_policy_loss":  # else the ratios overflow
            for name in {"old_logprobs", "ref_logprobs"} & case.x.keys():
                case.x[name] -= math.log(vocab)
        if op.name == "vespo_loss":  # else the weights, of the sums over a sequence, are next to 0
            case.x["old_logprobs"] = torch.lerp(case.x["logprobs"], case.x["old_logprobs"], 0.01)
        no_worse_than_naive(op, case, "native")


@pytest.mark.parametrize("op", LAYERS, ids=range(len(LAYERS)))
@every_dtype
@pytest.mark.parametrize("width", [15, 64, 65, 2049])
def test_layers(op: Op, dtype: torch.dtype, width: int) -> None:
    """Rows that end before, at and after the end of vectors, of blocks of them, and of a task."""
    near_the_truth(wide(op, width), make(wide(op, width), (2, 3), dtype))


# ---- memory ---------------------------------------------------------------------------------------------------------


@every_half
def test_offsets_past_two_to_the_31(dtype: torch.dtype) -> None:
    """Rows 2^30 elements apart, in memory that is reserved and hardly touched: forward, and the gradient over them."""
    stride, vocab = 2**30, 2049
    values = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    far = torch.empty(2 * stride + vocab, dtype=dtype).as_strided((3, vocab), (stride, 1)).copy_(values)
    targets, live = torch.tensor([5, 0, 2048]), torch.tensor([True, False, True])

    def exact_kl(logits: Tensor) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        kl = ops.exact_kl(leaf, values.flip(0), live)
        return [kl.detach(), *torch.autograd.grad(kl.sum(), leaf)]

    same_bits(exact_kl(far), exact_kl(values))

    leaf, exact = far.requires_grad_(), values.double().requires_grad_()
    run = implementation("masked_logprobs", leaf)  # the public function would make the logits contiguous
    ours = run(Inputs(leaf, Tokens(targets, live, torch.ones(3)), 0.0, vocab, False, False, True)).logprobs
    truth = exact.log_softmax(-1)[range(3), targets] * live
    (grad,), (true_grad,) = (torch.autograd.grad(out.sum(), x) for out, x in ((ours, leaf), (truth, exact)))
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(leaf, grad) and grad.data_ptr() == far.data_ptr()


def test_a_head_past_two_to_the_31() -> None:
    """Its rows are of an odd length, more than the bfloat16 product packs at once, which reads no neighbour's NaN."""
    generator = torch.Generator().manual_seed(0)
    hidden, values = (torch.randn(rows, 2051, generator=generator).bfloat16() for rows in (7, 130))
    hidden[4, 0] = torch.nan
    stride = 2**24 + 2**18
    weight = torch.empty(130 * stride, dtype=torch.bfloat16).as_strided((130, 2051), (stride, 1)).copy_(values)
    assert 129 * stride > 2**31
    targets = torch.arange(7) * 21
    truth = (hidden.double() @ values.double().T / 40).log_softmax(-1)[range(7), targets]
    ours = ops.linear_logprobs(hidden, weight, targets, temperature=40)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert ours.isnan().sum() == 1


@every_op
def test_every_output_is_written_whole(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory full of NaN, as torch fills it where it is asked to be deterministic, changes nothing."""
    monkeypatch.setattr(_products, "CHUNK_BYTES", 4 * VOCAB * 7)  # with a last chunk that is not full
    cases = [sizeable(op), make(op), make(op, (3, 5), torch.bfloat16)]
    clean = [results(op, case) for case in cases]
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
        poisoned = [results(op, case) for case in cases]
    finally:
        torch.use_deterministic_algorithms(deterministic)
    for ours, plain in zip(poisoned, clean, strict=True):
        same_bits(ours, plain)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "inside wider rows": lambda wide: wide[:, 3 : 3 + VOCAB],
    "every other column": lambda wide: wide[:, ::2],
    "transposed": lambda wide: wide[:, :VOCAB].T.contiguous().T,
    "expanded": lambda wide: wide[:1, 1 : 1 + VOCAB].expand(6, -1),
    "one row": lambda wide: wide[1, 1 : 1 + VOCAB].as_strided((1, VOCAB), (1, 1)),
}


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, dtype: torch.dtype) -> None:
    """Logits of any strides, and targets, mask, temperatures and incoming gradients that are not contiguous either."""
    generator = torch.Generator().manual_seed(0)
    wide, ref_wide = torch.randn(2, 6, 2 * VOCAB, generator=generator).to(dtype)
    logits, ref_logits = LAYOUTS[layout](wide), LAYOUTS[layout](ref_wide)
    rows = len(logits)
    targets = torch.randint(VOCAB, (rows, 3), generator=generator)[:, 1]
    mask = torch.tensor([[1, 0], [1, 0], [0, 0], [1, 0], [1, 0], [1, 0]])[:rows, 0]
    weights, each = torch.rand(rows, 3, generator=generator)[:, 1], torch.rand(rows, 2, generator=generator)[:, 1] + 0.5

    def run(lay: Callable[[Tensor], Tensor], temperature: Tensor, weights: Tensor) -> list[Tensor]:
        leaf = lay(logits.detach()).requires_grad_()
        options = {"mask": lay(mask), "temperature": lay(temperature)}
        outputs = ops.masked_logprobs(leaf, lay(targets), **options, return_entropy=True)
        kl = ops.exact_kl(leaf, lay(ref_logits), **options)
        grads = [torch.autograd.grad(out, leaf, lay(weights), retain_graph=True)[0] for out in (*outputs, kl)]
        return [*(out.detach() for out in (*outputs, kl)), *grads]

    for temperature in (each, each[:1].expand(rows), each[0]):
        for slopes in (weights, weights[:1].expand(rows)):
            strided, contiguous = (run(lay, temperature, slopes) for lay in (Tensor.detach, Tensor.contiguous))
            same_bits(strided, contiguous)


# ---- bit by bit -----------------------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads(op: Op, dtype: torch.dtype) -> None:
    case = sizeable(op, dtype)
    first = results(op, case)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        same_bits(results(op, case), first)


@row_wise_op
@every_dtype
def test_a_row_is_the_same_wherever_it_stands(op: Op, dtype: torch.dtype) -> None:
    """A row of blocks and a rest, alone and at other addresses: VOCAB is odd."""
    whole = make(op, (1, 9), dtype, vocab=VOCAB)

    def rows(start: int, stop: int) -> list[Tensor]:
        x = {name: tensor[:, start:stop].clone().requires_grad_(name in op.grads) for name, tensor in whole.x.items()}
        outputs = op.run(x, whole.targets[:, start:stop], None)
        leaves = [x[name] for name in op.grads]
        return [*(output.detach() for output in outputs), *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)]

    batch = rows(0, 9)
    for start, stop in [(0, 1), (4, 5), (8, 9), (1, 9), (3, 6)]:
        same_bits(rows(start, stop), [tensor[:, start:stop] for tensor in batch])


# ---- several callers ------------------------------------------------------------------------------------------------


def all_results(cases: list[Case], threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    return [tensor for op, case in zip(OPS, cases, strict=True) for tensor in results(op, case)]


def test_calls_from_several_threads_at_once() -> None:
    """The GIL is let go of, and each caller has OpenMP threads of its own."""
    cases = [[sizeable(op, torch.bfloat16, caller) for op in OPS] for caller in range(3)]
    alone = [all_results(mine, 1) for mine in cases]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(all_results, cases, [2] * 3))
    for ours, theirs in zip(together, alone, strict=True):
        same_bits(ours, theirs)


def test_a_forked_child() -> None:
    """On one thread, as torch itself needs it where the parent has used OpenMP: data loaders' workers are so."""
    cases = [sizeable(op, torch.bfloat16) for op in OPS]
    parents = all_results(cases, 2)
    child = multiprocessing.get_context("fork").Process(target=lambda: same_bits(all_results(cases, 1), parents))
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0
