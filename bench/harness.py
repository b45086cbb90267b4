"""Measures one workload: time, extra memory and error against float64 of each contestant, run in turn."""

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

SECONDS = 20.0  # time limit for the rounds of one workload
LEAST_ROUNDS, MOST_ROUNDS = 5, 50
SAMPLE_SECONDS = 5e-3  # shorter runs are repeated until they take this long, so that reading the clock does not matter


def measure(workload: Workload, device: torch.device, quick: bool) -> dict[str, Any]:
    """One row of the results; ``quick``: small sizes, a tenth of a second, no contestants that compile."""
    with gpu.on_its_own_stream(device):
        return _measured(workload, device, quick)


def _measured(workload: Workload, device: torch.device, quick: bool) -> dict[str, Any]:
    sizes = workload.quick if quick else workload.sizes
    torch.compiler.reset()
    small, contest = (built(workload, each, device) for each in (workload.quick, sizes))
    truth = contest.truth()
    found: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for name in contest.runs:
        if quick and name == COMPILED:
            missing[name] = "left out of --quick: compiling takes longer than all the rest"
            continue
        try:
            # Ours is measured on the first call, so that memory kept for later calls counts. Other libraries are
            # measured on their second call, so that memory left over from compiling does not count against them.
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
    takers = samplers(runs, contest.fresh, device)
    seconds = 0.1 if quick else gpu.SECONDS if device.type == "cuda" else SECONDS
    for name, samples in in_turn(takers, seconds).items():
        found[name] |= figures(samples, name, contest.work)
        if isinstance(taker := takers[name], gpu.Sampler):
            found[name] |= taker.told()
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
    """The contest; on a GPU with ours on each backend, and a plain copy of as many bytes as the work."""
    torch.manual_seed(0)
    contest = workload.build(sizes, device)
    if device.type == "cuda":
        contest = gpu.with_each_backend(gpu.with_equal_copy(contest, device), workload.op, device)
    return contest


def _called(contest: Contest, name: str) -> Results:
    if contest.fresh:
        contest.fresh()
    return contest.runs[name]()


# ---- time ----------------------------------------------------------------------------------------------------------


def samplers(
    runs: dict[str, Run], fresh: Callable[[], object] | None, device: torch.device
) -> Mapping[str, Callable[[], float]]:
    """Calling a sampler returns the seconds of one run: on the CPU those of the clock, on a GPU those of the device."""
    if device.type == "cuda":
        return gpu.samplers(runs, fresh, device)

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
    """One sample per contestant and round. Every contestant runs in each round, so that noise affects all of them. The
    order is random, so that no contestant always benefits from the previous one's cache.
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
    """Median and spread (half the distance between the quartiles), and the work per second at the median."""
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
    """The run's results, and the increase in peak memory, results included.

    On the CPU this is the high-water mark of the process, which Linux can reset, so it covers every allocator. None on
    other systems. On a GPU it is the peak of torch's allocator.
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
    if trim:  # cached free memory would be reused and not be counted
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
