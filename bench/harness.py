"""Measures one workload: its contestants in turn, each one's time, extra memory and error against float64."""

import ctypes
import functools
import gc
import random
import statistics
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import backends
from rlhf_fast.bench import device as gpu
from rlhf_fast.bench.workload import COMPILED, OURS, Contest, Mark, Missing, Results, Run, Work, Workload

SECONDS = 20.0  # a workload's rounds stop after them
LEAST_ROUNDS, MOST_ROUNDS = 5, 50
SAMPLE_SECONDS = 5e-3  # shorter runs are repeated to last so long, so that the clock's own cost does not count


def measure(workload: Workload, device: torch.device, quick: bool) -> dict[str, Any]:
    """One row of the results; ``quick`` takes the small sizes, a tenth of a second, and nothing that compiles."""
    with gpu.on_its_own_stream(device):
        return _measured(workload, device, quick)


def _measured(workload: Workload, device: torch.device, quick: bool) -> dict[str, Any]:
    sizes = workload.quick if quick else workload.sizes
    torch.compiler.reset()
    small, contest = (built(workload, each, device) for each in (workload.quick, sizes))
    if device.type == "cuda":
        contest = gpu.with_each_backend(gpu.with_equal_copy(contest, device), workload.op, device)
    truth = contest.truth()
    found: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for name in contest.runs:
        if quick and name == COMPILED:
            missing[name] = "left out of --quick: compiling takes longer than all the rest"
            continue
        try:
            # The memory of our first call, so that what we would keep for the next one counts. Peers are measured on
            # their second call, so that nothing that compiling leaves behind counts against them.
            start = perf_counter()
            _called(small if name == OURS else contest, name)
            results, extra_bytes = peak_extra_bytes(lambda name=name: _called(contest, name), device)  # type: ignore[misc]
            ready = perf_counter() - start
        except Missing as reason:
            missing[name] = str(reason)
        except Exception as error:
            if name == OURS:
                raise
            missing[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            found[name] = {
                "extra_mb": None if extra_bytes is None else extra_bytes / 1e6,
                "error": errors(contest.names, results, truth),
            }
            if device.type == "cuda":
                found[name]["first_calls_s"] = ready
            del results
    del truth, small
    runs = {name: contest.runs[name] for name in found}
    on_gpu = gpu.samplers(runs, contest.fresh, device) if device.type == "cuda" else {}
    seconds = 0.1 if quick else gpu.SECONDS if on_gpu else SECONDS
    for name, samples in in_turn(on_gpu or samplers(runs, contest.fresh), seconds).items():
        found[name] |= figures(samples, name, contest.work) | (on_gpu[name].told() if on_gpu else {})
    return {
        "op": workload.op,
        "name": workload.name(sizes),
        "sizes": sizes,
        "backend": backends(device)[workload.op]["chosen"],
        "ceiling": contest.work.ceiling if contest.work else None,
        "contestants": _with_ratios(found),
        "missing": missing,
        "marks": _reached((*workload.marks, *gpu.marks_of_backends(found)), found),
    }


def built(workload: Workload, sizes: dict[str, int], device: torch.device) -> Contest:
    torch.manual_seed(0)
    return workload.build(sizes, device)


def _called(contest: Contest, name: str) -> Results:
    if contest.fresh:
        contest.fresh()
    return contest.runs[name]()


# ---- time ----------------------------------------------------------------------------------------------------------


def samplers(runs: dict[str, Run], fresh: Callable[[], object] | None) -> dict[str, Callable[[], float]]:
    """On the CPU. A sampler's call gives the seconds of a run, by the clock."""

    def sample(run: Run, repeats: int) -> float:
        if fresh:
            fresh()
        start = perf_counter()
        for _ in range(repeats):
            run()
        return (perf_counter() - start) / repeats

    def repeats(run: Run) -> int:
        return 1 if fresh else max(1, round(SAMPLE_SECONDS / max(sample(run, 1), 1e-7)))

    return {name: functools.partial(sample, run, repeats(run)) for name, run in runs.items()}


def in_turn(takers: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """One sample a round of each. In a round every contestant runs, so that a noisy moment hits them all, in an order
    of chance, so that none always runs after the one that leaves it the warmest memory.
    """
    samples: dict[str, list[float]] = {name: [] for name in takers}
    order, chance = list(takers), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        end = perf_counter() + seconds
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and perf_counter() > end:
                break
            chance.shuffle(order)
            for name in order:
                samples[name].append(takers[name]())
    finally:
        gc.enable()
    return samples


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figures(samples: list[float], name: str, work: Work | None) -> dict[str, Any]:
    """Median and spread (half the distance between the quartiles), and what the median means in work done."""
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    result: dict[str, Any] = {"ms": median * 1e3, "spread_ms": (high - low) / 2 * 1e3, "rounds": len(samples)}
    if work and (name == OURS or not name.startswith(OURS)):
        amount = work.ceiling_amount if name == work.ceiling else work.amount
        result["gb_per_s" if work.unit == "bytes" else "gflop_per_s"] = amount / median / 1e9
    return result


def _with_ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for entry in found.values():
        entry["times_ours"] = entry["ms"] / found[OURS]["ms"]
    return found


def _reached(marks: tuple[Mark, ...], found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for mark in marks:
        value = mark.value(found)
        met = None if value is None else mark.met(value)
        rows.append({"mark": str(mark), "bound": mark.bound, "value": value, "met": met})
    return rows


# ---- memory and error ----------------------------------------------------------------------------------------------


def peak_extra_bytes(run: Run, device: torch.device) -> tuple[Results, int | None]:
    """The run's results, and by how much it raised the memory in use at its highest, results included.

    On the CPU that is the process's own high-water mark, which Linux lets it reset: whoever asked for the memory, it
    counts. None on other systems. On a GPU it is what torch's allocator gave out.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = run()
        synchronize(device)
        return results, torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return run(), None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # what the allocator keeps of freed memory would be used again and not be seen
        trim(0)
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")
    before = _status_bytes("VmRSS")
    results = run()
    return results, max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def errors(names: tuple[str, ...], results: Results, truth: Results) -> dict[str, float]:
    """For each result its largest error, as a share of the largest true entry."""
    if not results:
        return {}
    return {
        name: _error(result, exact)
        for name, result, exact in zip(names, results, truth, strict=True)
        if result is not None and exact is not None
    }


def _error(result: Tensor, exact: Tensor) -> float:
    if result.dim():
        result = result[: exact.shape[0]]
    scale = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((result.double() - exact).abs().max() / scale)
