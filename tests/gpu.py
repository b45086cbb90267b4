"""`make gpu`: the engine built for this machine's GPU, the tests marked gpu, compute-sanitizer, and the bench.

Uses what is installed (torch with CUDA, Triton, pytest, nvcc, a C++ compiler, CMake, Ninja), no network, and ends
within eight minutes: each step has its limit, and what that cuts off is told. build/gpu keeps each step's output.

Exit codes: 0 all done and passed, 1 something failed or was cut off, 2 this machine lacks what is needed.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "build" / "gpu"
STAND_INS = ROOT / "tests" / "stand_ins"
SECONDS = 470  # of the whole: the limits of the steps below, and what they leave is the bench's
LIMITS = {"build": 120, "collect": 60, "tests": 210, "sanitizer": 60}
GRACE = 8  # for an interrupted step to say how far it came
SHOWN = 20  # lines of a failing step; its log has them all

TESTS = ("-m", "pytest", "-m", "gpu", "tests/ops", "tests/kernels", "-p", "no:cacheprovider")
BUILD = "import shutil, setup; print('built', shutil.copy2(setup.compile_engine(), 'rlhf_fast'))"


class Step(NamedTuple):
    passed: bool
    told: str
    errors: tuple[str, ...] = ()  # the last of them in the log of a step that failed


class Outcome(NamedTuple):
    code: int
    cut_off: bool
    seconds: float
    log: str


def main() -> int:
    start = monotonic()
    missing = lacking()
    steps: dict[str, Step] = {}

    def step(name: str, result: Step) -> None:
        steps[name] = result
        print("\n    ".join([f"{name:<10} {result.told}", *result.errors]), flush=True)

    if missing:
        print("\n".join(["make gpu needs what is not here:", *(f"    {each}" for each in missing)]))
        return 2
    device = Device.found()
    os.environ |= {"RLHF_FAST_CUDA": "1", "RLHF_FAST_CUDA_ARCHS": device.architecture}
    paths = [ROOT, *([] if importlib.util.find_spec("hypothesis") else [STAND_INS]), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    print(f"device     {device.name or device.why_none}; compiling for compute capability {device.architecture}")
    step("build", build())
    if device.name is None:
        step("tests", collect())
        print(f"make gpu stops here: it asks for a CUDA device, and there is none ({device.why_none})")
        return 2
    step("tests", tests())
    step("sanitizer", sanitizer())
    results = ROOT / "bench" / "results" / results_name(device.name)
    summary, outcome = bench(results, SECONDS - (monotonic() - start))
    step("bench", outcome)

    print(f"\n{summary}\n")
    for name, each in steps.items():
        print(f"{'passed' if each.passed else 'FAILED'}  {name:<10} {each.told}")
    print(f"results: {results.relative_to(ROOT)}; logs: {LOGS.relative_to(ROOT)}; {monotonic() - start:.0f} s in all")
    return 0 if all(each.passed for each in steps.values()) else 1


# ---- what is there --------------------------------------------------------------------------------------------------


def lacking() -> list[str]:
    """What has to be installed first; beside it, nvcc and the interpreter's own programs are put on PATH."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    os.environ["PATH"] = os.pathsep.join(folders)
    missing = [
        f"{package}: pip install {package}"
        for package in ("torch", "triton", "pytest")
        if importlib.util.find_spec(package) is None
    ]
    programs = {"nvcc": "the CUDA toolkit", "cmake": "pip install cmake", "ninja": "pip install ninja"}
    missing += [f"{program}: {where}" for program, where in programs.items() if found(program) is None]
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))):
        missing.append("a C++ compiler: apt install g++")
    return missing


def found(program: str) -> str | None:
    """In the CUDA toolkit that was named, or on PATH."""
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which(program, path=os.pathsep.join([*homes, os.environ["PATH"]]))


class Device(NamedTuple):
    name: str | None
    architecture: str  # as nvcc numbers it
    why_none: str = ""

    @classmethod
    def found(cls) -> "Device":
        import torch

        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            return cls(torch.cuda.get_device_name(), f"{major}{minor}")
        if torch.version.cuda is None:
            why = f"torch {torch.__version__} is built without CUDA"
        else:
            why = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no GPU; try nvidia-smi"
        return cls(None, "90", why)


def results_name(device: str) -> str:
    """gpu-h100-80gb-hbm3.json of NVIDIA H100 80GB HBM3."""
    words = re.findall(r"[a-z0-9]+", device.lower().removeprefix("nvidia"))
    return f"gpu-{'-'.join(words)}.json"


# ---- the steps ------------------------------------------------------------------------------------------------------


def build() -> Step:
    """Without pip and setuptools' commands: whatever versions of them are there will do."""
    outcome = run("build", [sys.executable, "-c", BUILD], LIMITS["build"])
    return told(outcome, last_line(outcome.log, "built .*") or "no module")


def collect() -> Step:
    """Without a device the tests are only looked up."""
    outcome = run("collect", [sys.executable, *TESTS, "--collect-only", "-q"], LIMITS["collect"])
    return told(outcome, last_line(outcome.log, r".*tests? (?:collected|ran|deselected).*") or "no count of the tests")


def tests() -> Step:
    command = [sys.executable, *TESTS, "--tb=short", "-rfE", "--durations=10"]
    outcome = run("tests", command, LIMITS["tests"])
    counts = last_line(outcome.log, r"=+ (.*\d+ (?:passed|failed|error|skipped|deselected).*) in [\d.]+s.*=+")
    left = selected(outcome.log) - finished(counts or "")
    notes = [f"{left} not run"] if left > 0 else []
    if importlib.util.find_spec("hypothesis") is None:
        notes.append("those of properties skipped: hypothesis is not installed")
    return told(outcome, ", ".join([counts or "no summary", *notes]))


def selected(log: str) -> int:
    """How many tests pytest set out to run."""
    line = last_line(log, r"collected (\d+ items?.*)") or "0"
    numbers = {word: int(number) for number, word in re.findall(r"(\d+) (items?|selected)", line)}
    return numbers.get("selected", max(numbers.values(), default=0))


def finished(counts: str) -> int:
    """How many of them came to an end."""
    return sum(int(number) for number in re.findall(r"(\d+) (?:passed|failed|skipped|xfailed|xpassed)", counts))


def sanitizer() -> Step:
    """Every op at its smallest on each backend, under memcheck and, beside it, racecheck and initcheck."""
    tool = found("compute-sanitizer")
    if tool is None:
        return Step(True, "compute-sanitizer is not here: not run")

    def watched(kind: str) -> Step:
        options = ["--tool", kind, "--error-exitcode", "86", "--report-api-errors", "no"]
        command = [tool, *options, sys.executable, "tests/kernels/each_op_once.py"]
        # each tensor in memory of its own, so that what is past its end is nobody's
        outcome = run(kind, command, LIMITS["sanitizer"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        count = last_line(outcome.log, r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)") or "no summary"
        return told(outcome, f"{kind}: {count}")

    with ThreadPoolExecutor() as pool:
        steps = list(pool.map(watched, ("memcheck", "racecheck", "initcheck")))
    errors = tuple(error for each in steps for error in each.errors)
    return Step(all(each.passed for each in steps), "; ".join(each.told for each in steps), errors)


def bench(results: Path, left: float) -> tuple[str, Step]:
    """The bench's verdict, and how the run went. Triton compiles anew, so that first calls are a user's own."""
    import json

    results.unlink(missing_ok=True)  # an earlier run's
    cache = LOGS / "triton"
    shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-m", "rlhf_fast.cli", "bench", "--device", "cuda", "--json", str(results)]
    outcome = run("bench", command, left, TRITON_CACHE_DIR=str(cache))
    if not results.exists():
        return "no workload was measured", told(outcome, "no results")._replace(passed=False)
    sys.path.insert(0, str(ROOT))
    from rlhf_fast.bench import report

    *lines, totals = report.verdict(json.loads(results.read_text())).splitlines()
    return "\n".join(lines), told(outcome, totals)


# ---- running them ---------------------------------------------------------------------------------------------------


def run(name: str, command: list[Any], limit: float, **environment: str) -> Outcome:
    """Interrupts the command after ``limit`` seconds, as Ctrl-C would, and then ends it."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path, start, cut_off = LOGS / f"{name}.log", monotonic(), False
    with path.open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
        )
        try:
            process.wait(max(limit - GRACE, 0))
        except subprocess.TimeoutExpired:
            cut_off = True
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(process.returncode, cut_off, monotonic() - start, path.read_text(errors="replace"))


def told(outcome: Outcome, what: str) -> Step:
    """What came of a step, in one line."""
    passed = outcome.code == 0 and not outcome.cut_off
    line = f"{what}; {outcome.seconds:.0f} s"
    if outcome.cut_off:
        line += ", CUT OFF by its time limit"
    elif not passed:
        line += f", exit code {outcome.code}"
    log = [] if passed else outcome.log.splitlines()
    errors = [each for each in log if re.match(r"(FAILED|ERROR|E  |\S*Error\b)|.*\berror:", each)] or log
    return Step(passed, line, tuple(each[:200] for each in errors[-SHOWN:]))


def last_line(log: str, pattern: str) -> str | None:
    """The last line that is the pattern; its group, where it has one."""
    found = [match for line in log.splitlines() if (match := re.fullmatch(pattern, line.strip()))]
    return None if not found else found[-1][found[-1].re.groups and 1]


if __name__ == "__main__":
    sys.exit(main())
