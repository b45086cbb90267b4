"""The walk of the ops with an lm head: however it is cut, and whether dead rows are left out or passed over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import GPU_BACKENDS
from op_table import OPS, Case, Op, make, outputs_and_grads

from rlhf_fast.ops import _native, _products, _sweep
from rlhf_fast.ops._products import Plan, chunks, empty_logits, plan, product

head_op = pytest.mark.parametrize("op", [op for op in OPS if op.shared], ids=lambda op: op.name)


@head_op
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_cut_gives_the_same(
    op: Op, dtype: torch.dtype, behind: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(op, (3, 4), dtype)
    whole = outputs_and_grads(op.run, op, case, case.mask)
    # a GPU's kernels may not write a narrower gradient over the logits of the same fold
    behind = behind or backend in GPU_BACKENDS
    group = 9 if behind and dtype != torch.float32 else 5
    cut = Plan(rows=5, fold=2, columns=3, behind=behind, group=group)
    monkeypatch.setattr(_sweep, "plan", lambda *sizes: cut)
    rounding = 1e-5 if dtype == torch.float32 else 3e-2
    results = outputs_and_grads(op.run, op, case, case.mask)
    torch.testing.assert_close(results, whole, rtol=rounding, atol=rounding / 10)


@pytest.mark.gpu
@head_op
@pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)
def test_every_row_is_taken_into_a_graph(op: Op, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a CUDA graph is captured the number of live rows is not known; NaN in the dead ones still leads nowhere."""
    case = make(op)
    expected = outputs_and_grads(op.run, op, case, case.mask)
    poisoned = Case(dict(case.x), case.targets.masked_fill(~case.mask, 10**6), case.mask)
    for name in op.data:
        poisoned.x[name] = case.x[name].clone()
        poisoned.x[name][~case.mask] = torch.nan
    monkeypatch.setattr(_sweep, "_capturing", lambda tensor: True)
    results = outputs_and_grads(op.run, op, poisoned, case.mask)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)


def test_the_cut_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GB: 512 MB of logits at once, 1024 rows of 131072, whatever the number of rows. 8 GB: a 32nd of them."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(_products, "_memory", lambda device: 80_000_000_000)
    frozen = {"in_one": True, "keeps": False}
    assert plan(8192, 131072, 1, gpu, **frozen) == Plan(1024, 128, 131072, behind=True, group=1024)
    assert plan(8192, 131072, 2, gpu, **frozen).rows == 512
    assert plan(8192, 131072, 1, gpu, in_one=False, keeps=False).columns == 8192
    assert plan(1200, 131072, 1, gpu, **frozen).rows == 600
    assert plan(0, 131072, 1, gpu, **frozen) == Plan(1, 1, 131072, behind=True, group=1)
    monkeypatch.setattr(_products, "_memory", lambda device: 8 << 30)
    assert plan(4096, 262144, 1, gpu, **frozen) == Plan(256, 32, 262144, behind=True, group=256)


def test_the_cut_of_a_trained_head_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's gradient is summed 2048 rows at a time, or twice a chunk's where that is less."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(_products, "_memory", lambda device: 80_000_000_000)
    trained = {"in_one": True, "keeps": True}
    cut = plan(8192, 131072, 1, gpu, **trained)
    assert cut == Plan(1024, 128, 131072, behind=True, group=2048)
    sizes = [own.rows.stop - own.rows.start for own in chunks(cut, 2048, torch.bfloat16)]
    assert sizes == [1024, 544, 272, 136, 72]
    assert plan(8192, 131072, 2, gpu, **trained).group == 1024
    assert plan(5000, 131072, 1, gpu, **trained).group == 1667
    assert plan(1200, 131072, 1, gpu, **trained) == Plan(1024, 128, 131072, behind=True, group=1200)
    assert plan(8192, 32000, 1, gpu, **trained) == plan(8192, 32000, 1, gpu, in_one=True, keeps=False)
    on_cpu = plan(8192, 131072, 1, torch.device("cpu"), **trained)
    assert on_cpu.group == on_cpu.rows


def test_the_engine_multiplies_the_whole_width_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's products are tiled, and so are those to which a bias or an adapter is added."""
    sizes = (1024, 49152, 1, torch.device("cpu"))
    for own, columns in ((True, 49152), (False, 2048)):
        monkeypatch.setattr(_native, "multiplies_float32", lambda own=own: own)
        assert plan(*sizes, in_one=True, keeps=False).columns == columns
        assert plan(*sizes, in_one=False, keeps=False).columns == 2048


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("vocab", [131072, 151936, 32000])
def test_memory_of_a_heads_logits_on_a_gpu(vocab: int, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 600 MB, with a 16-bit gradient beside them, whose rows start on 128 bytes."""
    monkeypatch.setattr(_products, "_memory", lambda device: 80_000_000_000)
    cut = plan(10**6, vocab, 1, torch.device("cuda", 0), in_one=True, keeps=keeps)
    logits, grad = empty_logits(cut, vocab, torch.bfloat16, torch.device("meta"))
    assert logits.untyped_storage().nbytes() <= 600e6
    assert grad.stride(0) * grad.element_size() % 128 == 0
    assert grad.shape[0] == cut.group


@pytest.mark.parametrize("fold", [1, 2, 7, 16])
@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_no_gradient_lies_over_logits_that_are_still_read(rows: int, fold: int) -> None:
    """Nor over kept gradients. A row of the buffer holds two of the gradient."""
    for group in range(rows, 2 * rows + 1):
        cut = Plan(rows, fold, 3, behind=True, group=group)
        buffer = empty_logits(cut, 3, torch.bfloat16, torch.device("meta"))[0].shape[0]
        done = 0
        for own, place in chunks(cut, group, torch.bfloat16):
            assert own.start == done and place * 2 >= own.start  # behind the gradients that are kept
            assert place + own.stop - own.start <= buffer
            for first in range(own.start, own.stop, fold):
                end = min(first + fold, own.stop)
                assert end <= 2 * (place + first - own.start)
            done = own.stop
        assert done == group


def test_the_weights_gradient_takes_one_product_a_group(on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 rows in groups of 9, whose chunks have 5 rows or fewer; d hidden too."""
    monkeypatch.setattr(_sweep, "plan", lambda *sizes: Plan(rows=5, fold=2, columns=8, behind=True, group=9))
    rows: dict[str, list[int]] = {"add_over_rows_": [], "logits_product": []}

    def counted(name: str, place: int) -> None:
        real = getattr(_sweep, name)

        def call(*tensors: torch.Tensor) -> None:
            rows[name].append(tensors[place].shape[0])
            real(*tensors)

        monkeypatch.setattr(_sweep, name, call)

    counted("add_over_rows_", 1)
    counted("logits_product", 0)
    op = next(op for op in OPS if op.name == "linear_cross_entropy")
    case = make(op, (4, 5), torch.bfloat16)
    outputs_and_grads(op.run, op, case, None)
    assert rows["add_over_rows_"] == [9, 9, 2]
    assert len(rows["logits_product"]) > 3 and sum(rows["logits_product"]) == 20


@pytest.mark.parametrize("gap", [0, 64])
@pytest.mark.parametrize("inner", [7, 32, 33, 4111])
def test_a_product_reads_nothing_behind_a_row(inner: int, gap: int) -> None:
    """NaN in one row, and behind the end of each, is in that row of the result alone."""
    generator = torch.Generator().manual_seed(0)
    left = torch.full((100, inner + gap), torch.nan, dtype=torch.bfloat16)[:, :inner]
    left.copy_(torch.randn(left.shape, generator=generator))
    left[50, 0] = torch.nan
    right = torch.randn(inner, 96, generator=generator).bfloat16()
    # the result is rounded, 2^-9 of it, and so are up to 31 terms that are added up apart: 2^-9 of less than 51
    truth = left.double() @ right.double()
    torch.testing.assert_close(product(left, right).double(), truth, rtol=2**-8, atol=0.1, equal_nan=True)


def test_with_every_instruction_of_the_processor() -> None:
    """AMX too, which conftest.py leaves out: products that depend on the number of threads, but are as exact."""
    tests = [Path(__file__), Path(__file__).with_name("test_native.py")]
    which = "reads_nothing_behind or (float64_truth and bfloat16 and linear)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", which]
    subprocess.run(command, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, check=True)
