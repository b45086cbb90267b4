"""What only a GPU shows: full sizes, memory past 2^31 elements, streams, graphs, and that nothing waits for the device.

The backend is the one that dispatch chooses for a CUDA tensor. `make gpu` runs this file.
"""

from collections.abc import Iterator

import pytest
import torch
from devices import GPU
from op_table import LAYER_OPS, OPS, Case, Op, make, outputs_and_grads
from torch import Tensor

from rlhf_fast import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device; run make gpu on one")]
every_op = pytest.mark.parametrize("op", [*OPS, *LAYER_OPS], ids=lambda op: op.name)
token_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
COMPILED = ("masked_logprobs", "linear_logprobs", "gae", "clipped_policy_loss")
HALVES_AND_FLOAT = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield
    torch.cuda.synchronize()


def shape_of(op: Op) -> tuple[int, int]:
    """A few thousand tokens, or a few hundred with a vocabulary: what fits beside the float64 truth."""
    return (8, 33) if op.has_vocabulary else (37, 1031)


def every_result(op: Op, case: Case, weights: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients; nothing here asks the host for anything."""
    x = {name: tensor.detach().requires_grad_(name in op.grads) for name, tensor in case.x.items()}
    outputs = op.run(x, case.targets, case.mask)
    wanted = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output.requires_grad]
    if not wanted:
        return [*outputs]
    total = torch.stack([(output * weight).sum() for output, weight in wanted]).sum()
    return [*outputs, *torch.autograd.grad(total, [x[name] for name in op.grads], materialize_grads=True)]


def weights_for(op: Op, case: Case) -> list[Tensor]:
    return [torch.rand(output.shape) for output in op.run(case.x, case.targets, case.mask)]


# ---- full sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "vocab"),
    [(op, vocab) for op in [*OPS, *LAYER_OPS] for vocab in ((50257, 151936) if op.has_vocabulary else (0,))],
    ids=lambda part: part.name if isinstance(part, Op) else str(part),
)
@HALVES_AND_FLOAT
def test_against_float64_at_full_size(op: Op, dtype: torch.dtype, vocab: int) -> None:
    """No further from the truth than twice what the plain formula in the same dtype is, and a rounding."""
    case = make(op, shape_of(op), dtype, vocab=vocab)
    exact = Case({name: tensor.double() for name, tensor in case.x.items()}, case.targets, case.mask)
    true_outputs, true_grads = outputs_and_grads(op.naive, op, exact, case.mask)
    outputs, grads = outputs_and_grads(op.run, op, case, case.mask)
    plain_outputs, plain_grads = outputs_and_grads(op.naive, op, case, case.mask)

    def check(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
        scale = truth.abs().max()
        naive = (plain.double() - truth).abs().max().nan_to_num(torch.inf)  # float16 overflows
        allowed = 2 * naive + torch.finfo(ours.dtype).eps * scale + 1e-6 * scale
        assert ((ours.double() - truth).abs().max() <= allowed).item()

    for ours, plain, truth in zip(outputs, plain_outputs, true_outputs, strict=True):
        check(ours, plain, truth)
    for name in op.grads:
        if name not in op.constants:
            check(grads[name], plain_grads[name], true_grads[name])


@token_op
@HALVES_AND_FLOAT
def test_dead_rows_are_not_read_and_runs_repeat(op: Op, dtype: torch.dtype) -> None:
    case = make(op, shape_of(op), dtype, vocab=50257)
    weights = weights_for(op, case)
    first = every_result(op, case, weights)
    poisoned = Case(dict(case.x), case.targets.masked_fill(~case.mask, 10**6), case.mask)
    for name in op.data:
        poisoned.x[name] = case.x[name].clone()
        poisoned.x[name][~case.mask] = torch.nan
    for again in (every_result(op, case, weights), every_result(op, poisoned, weights)):
        for ours, same in zip(again, first, strict=True):
            assert torch.equal(ours, same)


def test_more_than_two_to_the_31_logits() -> None:
    """The last rows of a batch past 2^31 elements, and their gradient, are those of the same rows alone."""
    rows, vocab = 16500, 131072
    assert rows * vocab > 2**31
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16).normal_()
    targets = torch.randint(vocab, (rows,))
    last = logits[-3:].clone().requires_grad_()
    alone = ops.masked_logprobs(last, targets[-3:])
    (slope,) = torch.autograd.grad(alone.sum(), last)
    logits.requires_grad_()
    whole = ops.masked_logprobs(logits, targets, inplace_backward=True)
    (slopes,) = torch.autograd.grad(whole.sum(), logits)
    assert torch.equal(whole[-3:], alone) and torch.equal(slopes[-3:], slope)


def test_a_head_in_many_chunks() -> None:
    """More rows than a chunk holds, half of them dead, against the log-probs of whole logits."""
    hidden, weight = torch.randn(3000, 256).bfloat16().requires_grad_(), torch.randn(40000, 256).bfloat16() / 8
    targets, mask = torch.randint(40000, (3000,)), torch.rand(3000) < 0.5
    ours = ops.linear_logprobs(hidden, weight, targets, mask)
    (grad,) = torch.autograd.grad(ours.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    log_p = (exact @ weight.double().T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    truth = torch.where(mask, log_p, 0.0)
    (true_grad,) = torch.autograd.grad(truth.sum(), exact)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    assert (grad.double() - true_grad).norm() <= 1e-2 * true_grad.norm()


# ---- streams, graphs, waiting ----------------------------------------------------------------------------------------


@every_op
def test_on_another_stream(op: Op) -> None:
    case = make(op, shape_of(op), torch.float32)
    weights = weights_for(op, case)
    expected = every_result(op, case, weights)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # whatever runs on the default stream would be done before this
        late = {name: tensor + 0 for name, tensor in case.x.items()}
        results = every_result(op, Case(late, case.targets, case.mask), weights)
    side.synchronize()
    for ours, same in zip(results, expected, strict=True):
        assert torch.equal(ours, same)


@every_op
def test_captured_in_a_graph(op: Op) -> None:
    """Forward and backward, replayed on other data and another mask."""
    first, second = (make(op, shape_of(op), torch.float32, seed=seed) for seed in (0, 1))
    weights = weights_for(op, first)
    expected = [every_result(op, case, weights) for case in (first, second)]
    static = Case({name: tensor.clone() for name, tensor in first.x.items()}, first.targets.clone(), first.mask.clone())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        every_result(op, static, weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = every_result(op, static, weights)
    for case, true in zip((first, second), expected, strict=True):
        for name, tensor in case.x.items():
            static.x[name].copy_(tensor)
        static.targets.copy_(case.targets)
        static.mask.copy_(case.mask)
        graph.replay()
        for ours, same in zip(results, true, strict=True):
            if "bias" in op.shared:  # whose products take every row of a graph, the live ones alone outside it
                torch.testing.assert_close(ours, same, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(ours, same)


@pytest.mark.parametrize("op", [op for op in [*OPS, *LAYER_OPS] if "bias" not in op.shared], ids=lambda op: op.name)
def test_nothing_waits_for_the_device(op: Op) -> None:
    """But an op with an lm head, once, for the number of rows that it has to multiply: that one is not here."""
    case = make(op, shape_of(op), torch.float32)
    weights = weights_for(op, case)
    every_result(op, case, weights)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_result(op, case, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", [op for op in OPS if op.name in COMPILED], ids=lambda op: op.name)
def test_compiled_by_inductor(op: Op) -> None:
    """With the compiler's own CUDA graphs; without them, test_compile.py compiles every op."""
    torch.compiler.reset()
    case = make(op, (4, 8), torch.float32)
    expected = op.run(case.x, case.targets, case.mask)
    compiled = torch.compile(op.run, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # warms up, captures, replays
        torch.compiler.cudagraph_mark_step_begin()
        results = compiled(case.x, case.targets, case.mask)
        for ours, eager in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_the_kernels_are_chosen() -> None:
    """Dispatch, with nothing forced, gives CUDA tensors to a GPU's kernels."""
    for op in [*OPS, *LAYER_OPS]:
        assert ops.backends("cuda")[op.name]["chosen"] in ("cuda", "triton")
