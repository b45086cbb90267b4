"""The walk of the ops with an lm head: however it is cut, and whether dead rows are left out or passed over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import GPU_BACKENDS
from op_table import OPS, Case, Op, make, outputs_and_grads

from rlhf_fast.ops import _products, _sweep
from rlhf_fast.ops._products import Plan, empty_logits, plan, product

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
    cut = Plan(rows=5, fold=2, columns=3, behind=behind or backend in GPU_BACKENDS)
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
    assert plan(8192, 131072, 1, gpu, in_one=True) == Plan(1024, 128, 131072, behind=True)
    assert plan(8192, 131072, 2, gpu, in_one=True).rows == 512
    assert plan(8192, 131072, 1, gpu, in_one=False).columns == 8192
    assert plan(1200, 131072, 1, gpu, in_one=True).rows == 600
    assert plan(0, 131072, 1, gpu, in_one=True) == Plan(1, 1, 131072, behind=True)
    monkeypatch.setattr(_products, "_memory", lambda device: 8 << 30)
    assert plan(4096, 262144, 1, gpu, in_one=True) == Plan(256, 32, 262144, behind=True)


@pytest.mark.parametrize("vocab", [131072, 151936, 32000])
def test_memory_of_a_heads_logits_on_a_gpu(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 600 MB, with a 16-bit gradient beside them, whose rows start on 128 bytes."""
    monkeypatch.setattr(_products, "_memory", lambda device: 80_000_000_000)
    cut = plan(10**6, vocab, 1, torch.device("cuda", 0), in_one=True)
    logits, grad = empty_logits(cut, vocab, torch.bfloat16, torch.device("meta"))
    assert logits.untyped_storage().nbytes() <= 600e6
    assert grad.stride(0) * grad.element_size() % 128 == 0


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
