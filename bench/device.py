"""Times on a GPU: between CUDA events, from cold caches, of the replays of a captured CUDA graph.

A replay has none of the gaps that the host leaves between launches, so its time is the device's own. A run that cannot
be captured, since it waits for the device, is timed as it is called, and the results say so. What a call costs the host
is measured apart, for every contestant alike.
"""

import contextlib
import dataclasses
import functools
import gc
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any

import torch

from rlhf_fast import backends, use_backend
from rlhf_fast.bench.workload import COPY, OURS, Contest, Mark, Results, Run, copying

KERNELS = ("cuda", "triton")
SECONDS = 0.5  # a workload's rounds stop after them
SHORT, CALLS = 1e-3, 20  # a run this short, in seconds, is called so often for one sample of its host time
COPY_BYTES, PRODUCT = 2 << 30, 8192  # of the device's own ceilings


class Sampler:
    """One contestant. A call takes a sample, in seconds on the device; ``host`` gathers the host's seconds a call."""

    def __init__(self, run: Run, fresh: Callable[[], object] | None, cool: Callable[[], object], pool: Any) -> None:
        self.run, self.fresh, self.cool = run, fresh or (lambda: None), cool
        self.calls = 1
        self.why_eager: str | None = None
        self.host = [self.on_host()]  # once is enough of a long run, whose graph may take the memory for another
        try:
            self.try_without_waiting()
            self.kept = self.fresh()  # the captured run works on it
            self.launch: Callable[[], object] = captured(run, pool).replay
        except Exception as error:
            self.launch, self.why_eager = run, " ".join(str(error).split())[:200]
        self.short = self.on_device() < SHORT
        self.calls = CALLS if self.short and fresh is None else 1

    def try_without_waiting(self) -> None:
        """Raises RuntimeError where a run waits for the device: torch's allocator never gets over a failed capture."""
        self.fresh()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.run()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def __call__(self) -> float:
        if self.short:
            self.host.append(self.on_host())
        return self.on_device()

    def on_device(self) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.fresh()
        self.cool()  # and while it lasts, the host gets ahead of the device
        begin.record()
        self.launch()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def on_host(self) -> float:
        self.fresh()
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(self.calls):
            self.run()
        seconds = perf_counter() - start
        torch.cuda.synchronize()
        return seconds / self.calls

    def told(self) -> dict[str, Any]:
        """What the results say beside the times."""
        return {"host_us": statistics.median(self.host) * 1e6, "not_captured": self.why_eager}


def captured(run: Run, pool: Any) -> torch.cuda.CUDAGraph:
    """The run as a CUDA graph, on the current stream."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        run()
    return graph


def samplers(runs: dict[str, Run], fresh: Callable[[], object] | None, device: torch.device) -> dict[str, Sampler]:
    """The graphs share their memory: each writes what it reads, and only one is replayed at a time."""
    cool, pool = cooler(device), torch.cuda.graph_pool_handle()
    return {name: Sampler(run, fresh, cool, pool) for name, run in runs.items()}


def with_equal_copy(contest: Contest, device: torch.device) -> Contest:
    """The contest, its plain copy one of as many bytes as the work moves: a smaller one takes longer a byte."""
    work = contest.work
    if work is None or work.ceiling != COPY:
        return contest
    half = int(work.amount) // 2
    copy = copying(torch.empty(half, dtype=torch.uint8, device=device))
    return dataclasses.replace(
        contest, runs={**contest.runs, COPY: copy}, work=dataclasses.replace(work, ceiling_amount=2 * half)
    )


def with_each_backend(contest: Contest, op: str, device: torch.device) -> Contest:
    """The contest, ours also on the other backends of a GPU that can run here."""
    listing = backends(device)[op]
    runs: dict[str, Run] = {}
    for name, run in contest.runs.items():
        runs[name] = run
        if name == OURS:
            others = [each for each in KERNELS if each in listing["available"] and each != listing["chosen"]]
            runs |= {f"{OURS}, {each}": functools.partial(_on_backend, each, run) for each in others}
    return dataclasses.replace(contest, runs=runs)


def _on_backend(backend: str, run: Run) -> Results:
    with use_backend(backend):
        return run()


def marks_of_backends(contestants: Iterable[str]) -> tuple[Mark, ...]:
    """The backend chosen is the fastest, or as good as."""
    return tuple(Mark("within", 1.03, name) for name in contestants if name.removeprefix(f"{OURS}, ") in KERNELS)


def cooler(device: torch.device) -> Callable[[], object]:
    """Fills the L2 cache with other data. It reads: what was written would have to leave the cache in the next run."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device=device).view(torch.float32).zero_().sum


@contextlib.contextmanager
def on_its_own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU everything inside runs on the one stream of the bench, since the default one cannot be captured.

    What earlier workloads left in torch's cache is given back before.
    """
    if device.type == "cpu":
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    with torch.cuda.device(device), torch.cuda.stream(stream_of(device)):
        yield


@functools.cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device reaches at best: GB/s of a large copy, read and written, and TFLOP/s of a bf16 product."""
    with on_its_own_stream(device):
        left, right = torch.randn(2, PRODUCT, PRODUCT, dtype=torch.bfloat16, device=device)
        product = torch.empty_like(left)

        def multiply() -> Results:
            torch.mm(left, right, out=product)
            return ()

        copy = copying(torch.empty(COPY_BYTES, dtype=torch.uint8, device=device))
        copy(), multiply()  # cuBLAS makes its workspace outside of a capture
        takers = samplers({"copy": copy, "product": multiply}, None, device)
        seconds = {name: statistics.median(take() for _ in range(20)) for name, take in takers.items()}
    return {
        "copy_gb_per_s": 2 * COPY_BYTES / seconds["copy"] / 1e9,
        "bf16_product_tflop_per_s": 2 * PRODUCT**3 / seconds["product"] / 1e12,
    }


def described(device: torch.device) -> dict[str, Any]:
    """The GPU, for the results."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "l2_mb": properties.L2_cache_size / 1e6,
        "cuda": torch.version.cuda,
        "driver": driver(),
    }


def driver() -> str | None:
    """The driver's version as nvidia-smi tells it; None without that program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else None
