"""GPU timing on a simulated device with known clocks: only runs take device and host time."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_fast.bench import device as gpu
from rlhf_fast.bench import harness
from rlhf_fast.bench.workload import COPY, EAGER, OURS, Contest, Mark, Results, Run, Sizes, Work, Workload
from rlhf_fast.ops import _dispatch

CPU = torch.device("cpu")
GAP = 1.0  # what a launch from the host adds on the device


class Device:
    """Replaces torch.cuda: work is (name, seconds on the device, seconds on the host)."""

    def __init__(self) -> None:
        self.now = self.host = 0.0
        self.log: list[str] = []
        self.sync_mode: int | str = 0
        self.graph: Any = None

    def run(self, name: str, on_device: float, on_host: float = 0.0, waits: bool = False) -> Run:
        def run() -> Results:
            if waits and self.sync_mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            assert not (waits and self.graph), "a capture that fails is never recovered from"
            self.host += on_host
            if self.graph:
                self.graph.work += on_device
                self.log.append(f"{name} captured")
            else:
                self.now += on_device + GAP
                self.log.append(name)
            return ()

        return run


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = device.now

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            return (end.at - self.at) * 1e3

    class Graph:
        work = 0.0

        def replay(self) -> None:
            device.now += self.work
            device.log.append("replay")

    @contextlib.contextmanager
    def capture(graph: Graph, pool: str, stream: str) -> Iterator[None]:
        assert (pool, stream) == ("the pool", "the stream")
        device.graph = graph
        yield
        device.graph = None

    def set_mode(mode: int | str) -> None:
        device.sync_mode = mode

    for name, fake in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "current_stream": lambda: "the stream",
        "synchronize": lambda *_: None,
        "get_sync_debug_mode": lambda: device.sync_mode,
        "set_sync_debug_mode": set_mode,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gpu, "perf_counter", lambda: device.host)
    return device


def sampler(device: Device, run: Run, fresh: Callable[[], object] | None = None) -> gpu.Sampler:
    return gpu.Sampler(run, fresh, device.run("cool", 100.0), "the pool")


def test_a_replay_is_timed_and_the_host_apart(device: Device) -> None:
    taker = sampler(device, device.run("a", 2.0, on_host=0.5))
    assert taker() == pytest.approx(2.0)  # without the gap and the cache flush
    assert device.log == ["a", "a", "a captured", *["cool", "replay"] * 2]
    assert taker.told() == {"host_us": pytest.approx(5e5), "not_captured": None}


def test_what_waits_for_the_device_is_never_captured_and_says_so(device: Device) -> None:
    taker = sampler(device, device.run("a", 2.0, waits=True))
    assert taker() == pytest.approx(2.0 + GAP)
    assert taker.told()["not_captured"] == "called a synchronizing CUDA operation"
    assert device.log[-2:] == ["cool", "a"]
    assert device.sync_mode == 0  # restored after both ends of the trial
    sampler(device, device.run("b", 2.0))
    assert device.sync_mode == 0


def test_a_short_run_is_called_often_for_its_host_time(device: Device) -> None:
    taker = sampler(device, device.run("a", gpu.SHORT / 2, on_host=0.5))
    device.log.clear()
    taker()
    assert device.log.count("a") == gpu.CALLS and taker.host == [0.5, pytest.approx(0.5)]


def test_what_a_run_destroys_is_restored_before_each(device: Device) -> None:
    sampler(device, device.run("a", gpu.SHORT / 2), lambda: device.log.append("fresh"))()
    runs = [entry for entry in device.log if entry != "cool"]
    assert runs[::2] == ["fresh"] * 6 and runs[1::2] == ["a", "a", "a captured", "replay", "a", "replay"]


def test_what_the_captured_run_works_on_lives_as_long_as_it(device: Device) -> None:
    made: list[weakref.ref[Any]] = []

    class State: ...

    def fresh() -> State:
        state = State()
        made.append(weakref.ref(state))
        return state

    taker = sampler(device, device.run("a", 1.0), fresh)
    taker()
    gc.collect()
    assert [each() is not None for each in made] == [False, False, True, False, False]
    del taker


def test_the_copy_moves_as_many_bytes_as_the_work() -> None:
    ours: Run = tuple
    contest = Contest({OURS: ours, COPY: ours}, work=Work("bytes", 1001.0, COPY, 8.0))
    equal = gpu.with_equal_copy(contest, CPU)
    assert equal.work == Work("bytes", 1001.0, COPY, 1000.0)
    assert equal.runs[OURS] is ours and equal.runs[COPY] is not ours and equal.runs[COPY]() == ()
    for work in (None, Work("flops", 8.0, "its matrix products alone", 8.0)):
        other = Contest({OURS: ours}, work=work)
        assert gpu.with_equal_copy(other, CPU) is other


def test_ours_runs_on_each_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen backend must not be slower than the others."""
    forced: list[str | None] = []

    def run() -> Results:
        forced.append(_dispatch.forced_backend())
        return ()

    listing = {"available": ["cuda", "triton", "torch"], "chosen": "cuda"}
    monkeypatch.setattr(gpu, "backends", lambda device: {"gae": listing})
    contest = gpu.with_each_backend(Contest({OURS: run, EAGER: run}), "gae", CPU)
    assert list(contest.runs) == [OURS, f"{OURS}, triton", EAGER]
    for each in contest.runs.values():
        each()
    assert forced == [None, "triton", None]
    assert gpu.marks_of_backends(contest.runs) == (Mark("within", 1.03, f"{OURS}, triton"),)


def test_the_cache_is_filled_with_twice_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 20))
    read = gpu.cooler(CPU)
    assert read.__self__.nbytes == 2 << 20 and read() == 0  # type: ignore[attr-defined]


def test_the_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(gpu, "PRODUCT", 8)
    seconds = {"copy": 1e-9, "product": 1e-12}
    monkeypatch.setattr(gpu, "samplers", lambda runs, *_: {name: lambda name=name: seconds[name] for name in runs})
    assert gpu.ceilings(CPU) == pytest.approx({"copy_gb_per_s": 2048, "bf16_product_tflop_per_s": 1024})


def test_the_driver_is_what_nvidia_smi_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.driver() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    program.chmod(0o755)
    assert gpu.driver() == "580.65.06"


def test_a_row(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(sizes: Sizes, where: torch.device) -> Contest:
        runs = {
            OURS: device.run("ours", 1e-3, on_host=2e-5),
            EAGER: device.run("eager", 4e-3, waits=True),
            "a copy": device.run("copy", 5e-4),
        }
        return Contest(runs, work=Work("bytes", 1e6, "a copy", 2e6))

    def taken(runs: dict[str, Run], fresh: None, where: torch.device) -> dict[str, gpu.Sampler]:
        return {name: sampler(device, run, fresh) for name, run in runs.items()}

    monkeypatch.setattr(gpu, "samplers", taken)
    monkeypatch.setattr(gpu, "SECONDS", 0.0)
    monkeypatch.setattr(gpu, "with_equal_copy", lambda contest, where: contest)
    monkeypatch.setattr(gpu, "with_each_backend", lambda contest, op, where: contest)
    monkeypatch.setattr(gpu, "on_its_own_stream", contextlib.nullcontext)
    monkeypatch.setattr(harness, "peak_extra_bytes", lambda run, where: (run(), 0))
    monkeypatch.setattr(harness, "backends", lambda where: {"gae": {"chosen": "triton"}})
    marks = (
        Mark("share", 0.25, "a copy"),
        Mark("share", 0.26, "a copy"),
        Mark("share", 0.25, "an absent copy"),
        Mark("time", 1001),
        Mark("time", 999),
        Mark("host", 21),
        Mark("host", 19),
    )
    row = harness.measure(Workload("gae", "", {}, {}, build, marks), torch.device("cuda"), quick=False)
    entries = row["contestants"]
    assert entries[OURS]["ms"] == pytest.approx(1.0) and entries[OURS]["host_us"] == pytest.approx(20.0)
    assert entries[EAGER]["ms"] == pytest.approx(4 + GAP * 1e3)
    assert [entry["not_captured"] is None for entry in entries.values()] == [True, False, True]
    assert entries[OURS]["first_calls_s"] > 0
    assert [mark["met"] for mark in row["marks"]] == [True, False, None, True, False, True, False]
    assert [mark["mark"] for mark in row["marks"]][::3] == [
        "at least 25% of the rate of a copy",
        "at most 1001 us",
        "at most 19 us of host time",
    ]
