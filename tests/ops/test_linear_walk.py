"""The walk of the ops with an lm head: however it is cut, and whether dead rows are left out or passed over."""

import pytest
import torch
from devices import GPU_BACKENDS
from op_table import OPS, Case, Op, make, outputs_and_grads

from rlhf_fast.ops._fused import _linear, _live, _products
from rlhf_fast.ops._fused._products import Plan, plan

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
    monkeypatch.setattr(_linear, "plan", lambda *sizes: cut)
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
    monkeypatch.setattr(_live, "_capturing", lambda tensor: True)
    results = outputs_and_grads(op.run, op, poisoned, case.mask)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)


def test_the_cut_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GB and 50 MB of cache: 512 rows at once of 131072 logits, 50 of which fit in half the cache; 8 GB: fewer."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(_products, "_gpu", lambda device: (80_000_000_000, 50 << 20))
    assert plan(8192, 131072, 1, gpu, in_one=True) == Plan(512, 50, 131072, behind=True)
    assert plan(8192, 131072, 2, gpu, in_one=True).fold == 25
    assert plan(8192, 131072, 1, gpu, in_one=False).columns == 8192
    assert plan(600, 131072, 1, gpu, in_one=True).rows == 300
    assert plan(0, 131072, 1, gpu, in_one=True).rows == 1
    monkeypatch.setattr(_products, "_gpu", lambda device: (8 << 30, 4 << 20))
    assert plan(4096, 262144, 1, gpu, in_one=True) == Plan(256, 2, 262144, behind=True)
