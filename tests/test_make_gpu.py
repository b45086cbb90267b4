"""tests/gpu.py, the script of `make gpu`, where there is no GPU: what it finds missing, runs, cuts off and tells."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_under_test", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with its logs and results in a folder of the test's, and an environment that is restored."""
    script = module(TESTS / "gpu.py")
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "RLHF_FAST_CUDA", "RLHF_FAST_CUDA_ARCHS", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "LOGS", tmp_path / "build" / "gpu")
    monkeypatch.setattr(script, "GRACE", 2)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    return script


# ---- what is there


def test_all_that_is_missing_is_told_at_once(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.shutil, "which", lambda program, path=None: None)
    assert gpu.main() == 2
    assert capsys.readouterr().out.splitlines() == [
        "make gpu needs what is not here:",
        "    torch: pip install torch",
        "    triton: pip install triton",
        "    pytest: pip install pytest",
        "    nvcc: the CUDA toolkit",
        "    cmake: pip install cmake",
        "    ninja: pip install ninja",
        "    a C++ compiler: apt install g++",
    ]


def test_tools_of_the_cuda_toolkit_that_was_named(gpu: ModuleType, tmp_path: Path) -> None:
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch(0o755)
    assert gpu.found("compute-sanitizer") != str(tool)
    os.environ["CUDA_HOME"] = str(tmp_path / "cuda")
    assert gpu.found("compute-sanitizer") == str(tool)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu-h100-80gb-hbm3.json"),
        ("NVIDIA GeForce RTX 4090", "gpu-geforce-rtx-4090.json"),
        ("A/../B", "gpu-a-b.json"),
    ],
)
def test_the_results_are_named_after_the_device(gpu: ModuleType, device: str, name: str) -> None:
    assert gpu.results_name(device) == name


def test_the_device(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in gpu.Device.found().why_none
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "sees no GPU; try nvidia-smi" in gpu.Device.found().why_none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert gpu.Device.found() == ("Some GPU", "90", "")


# ---- steps


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def test_a_step_keeps_its_output_and_shows_its_errors(gpu: ModuleType) -> None:
    outcome = gpu.run("build", python("print('a.cpp:7: error: no'); print('more'); raise SystemExit(3)"), 60)
    assert (outcome.code, outcome.cut_off) == (3, False)
    assert (gpu.LOGS / "build.log").read_text() == outcome.log == "a.cpp:7: error: no\nmore\n"
    step = gpu.told(outcome, "no module")
    assert not step.passed and "no module; " in step.told and step.told.endswith(" s, exit code 3")
    assert step.errors == ("a.cpp:7: error: no",)
    assert gpu.told(gpu.run("build", python("import os; assert os.environ['A'] == 'b'"), 60, A="b"), "x").passed


@pytest.mark.parametrize("deaf", [False, True])
def test_a_step_that_takes_too_long_is_cut_off_and_says_so(gpu: ModuleType, deaf: bool) -> None:
    wait = "import signal, time; print('begun', flush=True); " + "signal.signal(signal.SIGINT, signal.SIG_IGN); " * deaf
    outcome = gpu.run("tests", python(wait + "time.sleep(600)"), 5)
    assert outcome.cut_off and outcome.seconds < 30 and "begun" in outcome.log
    assert ("KeyboardInterrupt" in outcome.log) is not deaf
    step = gpu.told(outcome, "3 passed")
    assert not step.passed and "CUT OFF by its time limit" in step.told


LOG = """
collected 900 items / 600 deselected / 300 selected
FAILED tests/ops/test_gae.py::test_it - assert 1 == 2
======= 1 failed, 279 passed, 4 skipped, 600 deselected, 7 warnings in 203.10s (0:03:23) =======
"""


def test_the_tests_that_were_not_run_are_counted(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.selected(LOG) == 300 and gpu.selected("collected 12 items") == 12 and gpu.selected("nothing") == 0
    monkeypatch.setattr(gpu, "run", lambda *arguments: gpu.Outcome(2, True, 210.0, LOG))
    step = gpu.tests()
    assert step.told.startswith(
        "1 failed, 279 passed, 4 skipped, 600 deselected, 7 warnings, 16 not run; 210 s, CUT OFF"
    )
    assert step.errors == ("FAILED tests/ops/test_gae.py::test_it - assert 1 == 2",)


def test_the_sanitizer(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "found", lambda program: None)
    assert gpu.sanitizer() == (True, "compute-sanitizer is not here: not run", ())
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 1 error"; [ "$2" = memcheck ] || exit 86\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu, "found", lambda program: str(tool))
    step = gpu.sanitizer()
    assert not step.passed and "exit code 86" in step.told
    assert step.told.startswith("memcheck: ERROR SUMMARY: 1 error; ") and "racecheck: ERROR SUMMARY" in step.told


def test_what_the_sanitizer_watches(capsys: pytest.CaptureFixture[str]) -> None:
    module(TESTS / "kernels" / "each_op_once.py").main(torch.device("cpu"), ("native",))
    told = capsys.readouterr().out
    assert "linear_policy_loss, 64 x 32 x 1000 bf16" in told and "gae, 4 x 64 packed native" in told


# ---- the whole

Script = Callable[[str], None]


def results(**rest: Any) -> dict[str, Any]:
    machine = {"gpu": "Some GPU", "versions": {"torch": "2.11"}}
    return {"machine": machine, "device": "cuda", "quick": False, "rows": [], "failed": {}, "pending": [], **rest}


def steps(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, device: str | None, measured: Any, code: int = 0
) -> list[str]:
    """Has main run on made-up outcomes; returns the list that the steps will be in."""
    ran: list[str] = []

    def run(name: str, command: list[str], limit: float, **environment: str) -> Any:
        assert limit > 0
        ran.append(name)
        if name == "bench" and measured:
            Path(command[-1]).write_text(json.dumps(measured))
        return gpu.Outcome(code if name == "tests" else 0, False, 1.0, "built x\n9 tests collected in 1s\n")

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "lacking", list)
    monkeypatch.setattr(gpu, "found", lambda program: f"/bin/{program}")
    monkeypatch.setattr(gpu.Device, "found", lambda: gpu.Device(device, "90", "" if device else "no GPU at all"))
    return ran


def test_without_a_device_it_goes_as_far_as_it_can_and_says_what_it_asks_for(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = steps(gpu, monkeypatch, None, None)
    assert gpu.main() == 2
    assert ran == ["build", "collect"]
    out = capsys.readouterr().out
    assert "9 tests collected in 1s" in out
    assert out.endswith("make gpu stops here: it asks for a CUDA device, and there is none (no GPU at all)\n")


@pytest.mark.parametrize("code", [0, 1])
def test_a_failing_test_does_not_keep_the_bench_from_running(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    ran = steps(gpu, monkeypatch, "NVIDIA Some GPU", results(pending=["gae, 1 x 2"]), code)
    assert gpu.main() == code
    assert sorted(ran[2:5]) == ["initcheck", "memcheck", "racecheck"]
    assert ran[:2] + ran[5:] == ["build", "tests", "bench"]
    summary, verdicts = capsys.readouterr().out.split("\n\n")[1:]
    assert summary.endswith("gae, 1 x 2: not reached")
    assert verdicts.splitlines()[0] == "passed  build      built x; 1 s"
    assert f"{'FAILED' if code else 'passed'}  tests" in verdicts
    assert "0 measured, 0 failed, 1 not reached; marks: 0 met" in verdicts
    assert "results: bench/results/gpu-some-gpu.json; logs: build/gpu; " in verdicts.splitlines()[-1]
    assert os.environ["RLHF_FAST_CUDA_ARCHS"] == "90"
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(gpu.ROOT)


def test_a_bench_without_results_is_a_failure(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = gpu.ROOT / "bench" / "results" / "gpu-some-gpu.json"
    earlier.write_text(json.dumps(results()))
    steps(gpu, monkeypatch, "Some GPU", None)
    assert gpu.main() == 1
    assert "no workload was measured" in capsys.readouterr().out and not earlier.exists()
