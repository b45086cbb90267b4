"""Every Triton kernel, compiled for an H100 and an MI300 without a GPU, keeps to budget.json; for an H100 also to
docs/roofline.md.

compile_ahead.py --renew and --roofline compile for the other targets too.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton_roofline
from budget import TARGETS, breaches, extended, read_budget

import rlhf_fast

pytest.importorskip("triton", reason="Triton is there on Linux alone")
HERE = Path(__file__).parent
PACKAGE = Path(rlhf_fast.__file__).parent


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_keep_to_their_budget(target: str, tmp_path: Path) -> None:
    reports = lines_of(tmp_path, "compile_ahead.py", target)
    found = breaches(read_budget(), reports, target)
    if target == "sm_90":
        found += triton_roofline.breaches(reports)
    assert not found, "\n".join(found)


def lines_of(cache: Path, script: str, *arguments: str) -> list[dict[str, Any]]:
    """What a script of this folder says, in a process where Triton does not interpret the kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    environment.setdefault("TRITON_CACHE_DIR", str(cache))  # keep one to compile only what has changed
    run = subprocess.run([sys.executable, HERE / script, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_sizes_and_addresses_compile_a_kernel_twice_at_most(tmp_path: Path) -> None:
    """Once for multiples of 16 and once for any."""
    forms = lines_of(tmp_path, "forms.py")
    assert {form["kernel"] for form in forms} >= {"gae._sweep", "ppo_loss._evaluate", "sums.sum_segments"}
    assert not (often := [form for form in forms if form["forms"] > 2]), often


def test_the_numbers_of_a_loss_compile_no_kernel_again() -> None:
    from triton.runtime.jit import mangle_type

    from rlhf_fast.kernels.formulas import kernel_terms
    from rlhf_fast.kernels.records import PolicyTerms, ValueTerms

    policy = kernel_terms(PolicyTerms(kl_coef=1.0, kl=2, kl_slope=2))
    assert mangle_type(policy, specialize=True) == ("fp32",) * 5 + ("constexpr",) * 2
    assert mangle_type(ValueTerms(), specialize=True) == ("fp32",) * 2


def test_every_launched_kernel_has_a_budget() -> None:
    launched = set()
    for file in (PACKAGE / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "launch":
                launched.add(node.args[0].id)  # launch(kernel, grid, ...)
    budgeted = {kernel.partition(".")[2] for kernel in read_budget()}
    assert launched == budgeted
    assert all(set(targets) == set(TARGETS) for targets in read_budget().values())


REPORT = {
    "kernel": "gae._sweep", "triton": "3.9.0", "form": "live=None", "wide": True, "registers": 60, "stack": 0,
    "local": 0, "spills": 0, "load": 128, "store": 128, "shared": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value", "line"),
    [
        ("registers", 73, "gae._sweep on sm_90: registers 73 a thread, allowed at most 72 [live=None]"),
        ("stack", 8, "gae._sweep on sm_90: stack 8 bytes, allowed at most 0 [live=None]"),
        ("local", 4, "gae._sweep on sm_90: local 4 bytes, allowed at most 0 [live=None]"),
        ("spills", 4, "gae._sweep on sm_90: spills 4 bytes, allowed at most 0 [live=None]"),
        ("shared", 1 << 20, "gae._sweep on sm_90: shared 1048576 bytes, allowed at most 232448 [live=None]"),
        ("load", 64, "gae._sweep on sm_90: load 64 bits, allowed at least 128 [live=None]"),
        ("store", 32, "gae._sweep on sm_90: store 32 bits, allowed at least 128 [live=None]"),
    ],
)
def test_a_breach_is_named(column: str, value: int, line: str) -> None:
    budget = extended({}, [REPORT], "sm_90")
    assert breaches(budget, [REPORT], "sm_90") == []
    assert breaches(budget, [{**REPORT, column: value}], "sm_90") == [line]


def test_kernels_that_come_and_go_are_named() -> None:
    budget = extended({}, [REPORT], "sm_90")
    (new, gone) = breaches(budget, [{**REPORT, "kernel": "gae._new"}], "sm_90")
    assert "gae._new on sm_90: not in budget.json" in new
    assert "gae._sweep on sm_90: in budget.json" in gone


def test_a_spill_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    import triton.language as tl
    from compile_ahead import gpu_target, report
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    def many_at_once(x, out, SIZE: tl.constexpr):
        index = tl.arange(0, SIZE)
        first, second = tl.load(x + index), tl.load(x + SIZE + index)
        tl.store(out + index, second)  # may be where ``first`` was read
        tl.store(out + SIZE + index, first)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = ASTSource(JITFunction(many_at_once), {"x": "*fp32", "out": "*fp32", "SIZE": "constexpr"}, {"SIZE": 4096})
    for target, column in (("sm_90", "stack"), ("gfx942", "spills")):
        options = {"num_warps": 1, "enable_fp_fusion": True}
        options |= {"maxnreg": 32} if target == "sm_90" else {"waves_per_eu": 8}
        assert report(triton.compile(source, target=gpu_target(target), options=options))[column] > 0
