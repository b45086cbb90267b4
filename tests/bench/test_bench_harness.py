"""The harness on synthetic contestants with known times, memory and errors."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_fast.bench import harness
from rlhf_fast.bench.workload import COMPILED, OURS, Contest, Mark, Missing, Results, Run, Sizes, Work, Workload

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MB = 1 << 20


class Clock:
    """Replaces perf_counter: time passes only in a run."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def run(self, name: str, seconds: float) -> Run:
        def run() -> Results:
            self.now += seconds
            self.log.append(name)
            return ()

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(harness, "perf_counter", lambda: clock.now)
    return clock


# ---- time


def test_contestants_take_turns_in_changing_orders(clock: Clock) -> None:
    runs = {name: clock.run(name, 1.0) for name in "abc"}
    samples = harness.in_turn(harness.samplers(runs, lambda: clock.log.append("-"), CPU), 0.0)
    assert harness.LEAST_ROUNDS == 5
    assert clock.log[::2] == ["-"] * 15
    rounds = ["".join(clock.log[start + 1 : start + 6 : 2]) for start in range(0, 30, 6)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 2
    assert samples == {name: [1.0] * 5 for name in "abc"}


def test_what_restores_the_inputs_is_not_timed(clock: Clock) -> None:
    samples = harness.in_turn(harness.samplers({"a": clock.run("a", 1.0)}, clock.run("fresh", 100.0), CPU), 0.0)
    assert samples == {"a": [1.0] * 5}


def test_a_short_run_is_repeated_and_a_long_one_is_not(clock: Clock) -> None:
    runs = {"short": clock.run("short", harness.SAMPLE_SECONDS / 8), "long": clock.run("long", 1.0)}
    samples = harness.in_turn(harness.samplers(runs, None, CPU), 0.0)
    assert samples["short"] == pytest.approx([harness.SAMPLE_SECONDS / 8] * 5)
    assert clock.log.count("short") == 1 + 5 * 8 and clock.log.count("long") == 1 + 5


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (11.5, 12), (1e9, harness.MOST_ROUNDS)])
def test_rounds_stop_when_the_time_is_up(seconds: float, rounds: int, clock: Clock) -> None:
    samples = harness.in_turn(harness.samplers({"a": clock.run("a", 1.0)}, None, CPU), seconds)
    assert len(samples["a"]) == rounds


def test_figures() -> None:
    work = Work("bytes", 6e9, "the ceiling", 12e9)
    samples = [1.0, 5.0, 3.0, 2.0, 4.0]  # quartiles 2, 3, 4
    plain = {"ms": 3000.0, "spread_ms": 1000.0, "rounds": 5}
    assert harness.figures(samples, OURS, work) == {**plain, "gb_per_s": 2.0}
    assert harness.figures(samples, "the ceiling", work) == {**plain, "gb_per_s": 4.0}
    assert harness.figures(samples, "a peer", Work("flops", 3e9, "", 0)) == {**plain, "gflop_per_s": 1.0}
    assert harness.figures(samples, f"{OURS}, other work", work) == plain
    assert harness.figures(samples, OURS, None) == plain


def test_pytest_benchmark_shows_the_harness_samples(tmp_path: Path) -> None:
    """`pytest bench/`, in a process of its own, whose samples take a quarter of a second each."""
    program = f"""
import pytest
from rlhf_fast.bench import harness
harness.samplers = lambda runs, fresh, device: {{name: lambda: 0.25 for name in runs}}
chosen = ["--quick", "-k", "token_kl and eager", "-p", "no:cacheprovider"]
raise SystemExit(pytest.main(["bench", *chosen, "--benchmark-json", "{tmp_path}/found.json"]))
"""
    # under xdist, of which the environment tells, pytest-benchmark measures nothing
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, capture_output=True)
    (found,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert (found["stats"]["median"], found["stats"]["rounds"]) == (0.25, harness.LEAST_ROUNDS)


# ---- memory


def with_torch(megabytes: int) -> Results:
    return (torch.ones(megabytes * MB // 4),)


def outside_torch(megabytes: int) -> Results:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    memory = library.malloc(megabytes * MB)
    library.memset(memory, 1, megabytes * MB)
    library.free(memory)
    return ()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the high-water mark of a part of a process")
@pytest.mark.parametrize("take", [with_torch, outside_torch])
def test_memory_is_counted_whoever_asks_for_it(take: Callable[[int], Results]) -> None:
    take(1)
    _, extra = harness.peak_extra_bytes(lambda: take(64), CPU)
    assert extra is not None and 62 * MB < extra < 68 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the high-water mark of a part of a process")
def test_memory_that_the_allocator_kept_counts_again() -> None:
    kept = [torch.ones(MB // 8) for _ in range(64)]  # 32 MB in blocks too small for the system to take back
    del kept
    results, extra = harness.peak_extra_bytes(lambda: tuple(torch.ones(MB // 8) for _ in range(64)), CPU)
    assert len(results) == 64
    assert extra is not None and 30 * MB < extra < 36 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the high-water mark of a part of a process")
def test_no_memory_is_none() -> None:
    _, extra = harness.peak_extra_bytes(tuple, CPU)
    assert extra is not None and extra < MB


def test_other_systems_leave_memory_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert harness.peak_extra_bytes(tuple, CPU) == ((), None)


# ---- errors


def test_the_error_is_a_share_of_the_largest_true_entry() -> None:
    truth = (torch.tensor([2.0, -4.0], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    results = (torch.tensor([2.0, -3.0, 77.0]), torch.tensor(1.5))  # the truth may hold the first rows alone
    assert harness.errors(("gradient", "loss"), results, truth) == {"gradient": 0.25, "loss": 0.5}
    assert harness.errors(("gradient", "loss"), (None, torch.tensor(1.0)), truth) == {"loss": 0.0}
    assert harness.errors(("gradient", "loss"), (), truth) == {}
    zeros = (torch.zeros(2, dtype=torch.float64), truth[1])
    assert harness.errors(("gradient", "loss"), (torch.zeros(2), torch.tensor(1.0)), zeros)["gradient"] == 0.0


# ---- one row


def contest(sizes: Sizes, device: torch.device) -> Contest:
    ones = torch.ones(sizes["n"], device=device)

    def absent() -> Results:
        raise Missing("not installed: pip install absent")

    def broken() -> Results:
        raise RuntimeError("two\nlines")

    return Contest(
        {
            OURS: lambda: (ones + 1,),
            "a peer": lambda: (ones + 3,),
            "an absent peer": absent,
            "a broken peer": broken,
            COMPILED: lambda: (ones + 1,),
            "the ceiling": tuple,
        },
        names=("sum",),
        truth=lambda: (torch.full_like(ones, 2, dtype=torch.float64),),
        work=Work("bytes", 8e9, "the ceiling", 8e9),
    )


MARKS = (
    Mark("faster", 1e-9, "a peer"),
    Mark("faster", 1e9, "a peer"),
    Mark("within", 1e9, "a peer"),
    Mark("within", 1e-9, "a peer"),
    Mark("above", 1e9, "a peer"),
    Mark("above", -1e9, "a peer"),
    Mark("faster", 2, "an absent peer"),
)
WORKLOAD = Workload("gae", "{n} numbers", {"n": 256}, {"n": 16}, contest, MARKS)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SECONDS", 0.0)


def test_a_row(short: None) -> None:
    row = harness.measure(WORKLOAD, CPU, quick=False)
    assert (row["op"], row["name"], row["sizes"], row["ceiling"]) == (
        "gae",
        "gae, 256 numbers",
        {"n": 256},
        "the ceiling",
    )
    assert row["backend"] in ("native", "torch")
    assert row["missing"] == {
        "an absent peer": "not installed: pip install absent",
        "a broken peer": "failed: RuntimeError: two lines",
    }
    entries = row["contestants"]
    assert list(entries) == [OURS, "a peer", COMPILED, "the ceiling"]
    assert entries[OURS]["error"] == {"sum": 0.0} and entries["a peer"]["error"] == {"sum": 1.0}
    assert entries["the ceiling"]["error"] == {}
    assert entries[OURS]["times_ours"] == 1.0
    assert entries["a peer"]["times_ours"] == entries["a peer"]["ms"] / entries[OURS]["ms"]
    assert all(entry["rounds"] == 5 and entry["gb_per_s"] > 0 for entry in entries.values())
    assert [mark["met"] for mark in row["marks"]] == [True, False, True, False, True, False, None]
    assert row["marks"][0]["value"] == pytest.approx(entries["a peer"]["times_ours"])
    assert row["marks"][2]["value"] == pytest.approx(1 / entries["a peer"]["times_ours"])
    assert row["marks"][4]["value"] == pytest.approx((entries[OURS]["ms"] - entries["a peer"]["ms"]) * 1e3)
    assert row["marks"][6] == {"mark": "at least 2x as fast as an absent peer", "bound": 2, "value": None, "met": None}


def test_quick_takes_small_sizes_and_compiles_nothing() -> None:
    row = harness.measure(WORKLOAD, CPU, quick=True)
    assert row["sizes"] == {"n": 16} and COMPILED not in row["contestants"]
    assert "--quick" in row["missing"][COMPILED]


def test_our_own_failure_stops_the_bench() -> None:
    def failing(sizes: Sizes, device: torch.device) -> Contest:
        def ours() -> Results:
            raise RuntimeError("ours")

        return Contest({OURS: ours})

    with pytest.raises(RuntimeError, match="ours"):
        harness.measure(Workload("gae", "", {}, {}, failing), CPU, quick=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the high-water mark of a part of a process")
def test_memory_that_we_keep_for_the_next_call_counts(short: None) -> None:
    kept: Iterator[Tensor] | list[Tensor] = []

    def build(sizes: Sizes, device: torch.device) -> Contest:
        def ours() -> Results:
            if len(kept) < 2:  # once at the small sizes, once at the full ones
                kept.append(torch.ones(sizes["megabytes"] * MB // 4))
            return ()

        return Contest({OURS: ours})

    workload = Workload("gae", "", {"megabytes": 40}, {"megabytes": 1}, build, (Mark("memory", 20), Mark("memory", 60)))
    row = harness.measure(workload, CPU, quick=False)
    assert 38 * MB < row["contestants"][OURS]["extra_mb"] * 1e6 < 44 * MB
    assert [mark["met"] for mark in row["marks"]] == [False, True]


def test_what_a_run_destroys_is_restored_before_each(short: None) -> None:
    def build(sizes: Sizes, device: torch.device) -> Contest:
        x = torch.zeros(4, device=device)
        return Contest(
            {OURS: lambda: (x.add_(1),), "a peer": lambda: (x.add_(1).clone(),)},
            names=("x",),
            truth=lambda: (torch.ones(4, dtype=torch.float64),),
            fresh=x.zero_,
        )

    row = harness.measure(Workload("gae", "", {}, {}, build), CPU, quick=False)
    assert [entry["error"] for entry in row["contestants"].values()] == [{"x": 0.0}, {"x": 0.0}]
