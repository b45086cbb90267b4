"""`make gpu` where there is no GPU: a made-up Python tells what it was asked to run, fails, or takes too long."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
STEPS = ["build", "each-op", "tests", "memcheck", "racecheck", "initcheck", "bench", "roofline"]
PYTHON = """#!/bin/sh
case "$*" in
  *get_device_capability*) [ -z "$NO_GPU" ] || { echo "RuntimeError: no GPU" >&2; exit 1; }; echo 90 ;;
  *sysconfig*) echo "$PWD/bin" ;;
  *hypothesis*) ;;
  *pytest*) echo "asked: $*"; exec "$REAL" -c "${TESTS:-pass}" ;;
  *) echo "asked: $*, archs $RLHF_FAST_CUDA_ARCHS" ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "========= ERROR SUMMARY: 1 error"
[ "$2" != "$SANITIZER_FINDS" ] || exit 86
"""

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("timeout") is None, reason="no make, or no timeout of GNU coreutils"
)


class Gpu:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(TESTS.parent / "Makefile", folder)
        (folder / "bin").mkdir()
        for name, script in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
            (folder / "bin" / name).write_text(script)
            (folder / "bin" / name).chmod(0o755)

    def make(self, *settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.defpath, "REAL": sys.executable, **environment}
        command = ["make", "gpu", f"PYTHON={self.folder}/bin/python", *settings]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    def log(self, step: str) -> str:
        return (self.folder / "build" / "gpu" / f"gpu-{step}.log").read_text()


@pytest.fixture
def gpu(tmp_path: Path) -> Gpu:
    return Gpu(tmp_path)


def test_every_step_runs_in_turn_and_keeps_its_output(gpu: Gpu) -> None:
    done = gpu.make()
    assert done.returncode == 0, done.stderr
    assert [line[7:] for line in done.stdout.splitlines() if line.startswith("== gpu-")][:3] == STEPS[:3]
    assert done.stdout.index("== gpu-initcheck") < done.stdout.index("== gpu-bench")
    assert "compile_engine" in gpu.log("build") and "archs 90" in gpu.log("build")
    assert gpu.log("each-op") == "asked: tests/kernels/each_op_once.py, archs 90\n"
    assert gpu.log("tests").startswith("asked: -m pytest -m gpu tests/ops tests/kernels ")
    assert gpu.log("bench").startswith("asked: -m rlhf_fast.cli bench --device cuda --json bench/results,")
    assert gpu.log("roofline").startswith("asked: tests/cuda/measured.py")
    summary = done.stdout[done.stdout.index("==> build/gpu/") :]
    assert all(f"==> build/gpu/gpu-{step}.log <==" in summary for step in STEPS)


def test_without_a_device_it_says_so_and_stops(gpu: Gpu) -> None:
    done = gpu.make(NO_GPU="1")
    assert done.returncode == 2 and "RuntimeError: no GPU" in done.stderr and "== gpu-" not in done.stdout


def test_a_step_that_fails_is_told_and_the_rest_runs(gpu: Gpu) -> None:
    done = gpu.make(TESTS="raise SystemExit(3)", SANITIZER_FINDS="racecheck")
    assert done.returncode == 2
    assert "FAILED: gpu-tests, exit code 3" in gpu.log("tests") and "asked" in gpu.log("bench")
    assert "FAILED: gpu-racecheck, exit code 86" in gpu.log("racecheck")
    assert gpu.log("memcheck") == gpu.log("initcheck") == "========= ERROR SUMMARY: 1 error\n"
    assert "FAILED: gpu-tests" in done.stdout[done.stdout.index("==> build/gpu/") :]


def test_a_step_that_takes_too_long_is_interrupted_and_the_rest_runs(gpu: Gpu) -> None:
    done = gpu.make("TESTS_SECONDS=5", TESTS="import time; print('begun', flush=True); time.sleep(600)")
    assert done.returncode == 2
    assert "begun" in gpu.log("tests") and "KeyboardInterrupt" in gpu.log("tests")  # as by Ctrl-C: pytest sums up
    assert "FAILED: gpu-tests, exit code 124 (124 or 137: its time was up)" in gpu.log("tests") and "asked" in gpu.log(
        "bench"
    )


def test_a_machine_without_the_sanitizer(gpu: Gpu) -> None:
    (gpu.folder / "bin" / "compute-sanitizer").unlink()
    done = gpu.make()
    assert done.returncode == 0 and gpu.log("sanitizer") == "compute-sanitizer is not here: not run\n"


def test_what_the_sanitizer_watches(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("each_op_once", TESTS / "kernels" / "each_op_once.py")
    assert spec is not None and spec.loader is not None
    each_op_once = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(each_op_once)
    each_op_once.main(torch.device("cpu"), ("native",))
    told = capsys.readouterr().out
    assert "linear_policy_loss, 64 x 32 x 1000 bf16" in told and "gae, 4 x 64 packed native" in told
    assert "exact_kl in place, 8 x 9001 torch.bfloat16 native" in told
