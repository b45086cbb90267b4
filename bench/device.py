"""Times on a GPU: replays of a captured CUDA graph with cold caches, measured by CUDA events.

A replay has no gaps between launches, so its time is that of the device alone. A run that cannot be captured, because
it waits for the device, is timed as it is called, and the results say so. Host time per call is measured separately, in
the same way for every contestant.
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
SECONDS = 0.5  # time limit for the rounds of one workload
SHORT, CALLS = 1e-3, 20  # runs shorter than this many seconds are called several times per sample of host time
COPY_BYTES, PRODUCT = 2 << 30, 8192  # for the ceilings of the device


class Sampler:
    """One contestant. Calling it takes one sample, in device seconds; ``host`` collects the host seconds per call."""

    def __init__(self, run: Run, fresh: Callable[[], object] | None, cool: Callable[[], object], pool: Any) -> None:
        self.run, self.fresh, self.cool = run, fresh or (lambda: None), cool
        self.calls = 1
        self.why_eager: str | None = None
        self.host = [self.on_host()]  # once is enough for a long run; a second graph may need too much memory
        try:
            self.try_without_waiting()
            self.kept = self.fresh()  # the captured run uses it
            self.launch: Callable[[], object] = captured(run, pool).replay
        except Exception as error:
            self.launch, self.why_eager = run, " ".join(str(error).split())[:200]
        self.short = self.on_device() < SHORT
        self.calls = CALLS if self.short and fresh is None else 1

    def try_without_waiting(self) -> None:
        """Raises RuntimeError if the run waits for the device: a failed capture leaves torch's allocator broken."""
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
        self.cool()  # meanwhile the host gets ahead of the device
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
        """What the results contain in addition to the times."""
        return {"host_us": statistics.median(self.host) * 1e6, "not_captured": self.why_eager}


def captured(run: Run, pool: Any) -> torch.cuda.CUDAGraph:
    """The run as a CUDA graph, on the current stream."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        run()
    return graph


def samplers(runs: dict[str, Run], fresh: Callable[[], object] | None, device: torch.device) -> dict[str, Sampler]:
    """The graphs share their memory: each writes all that it reads, and only one is replayed at a time."""
    cool, pool = cooler(device), torch.cuda.graph_pool_handle()
    return {name: Sampler(run, fresh, cool, pool) for name, run in runs.items()}


def with_equal_copy(contest: Contest, device: torch.device) -> Contest:
    """The contest; its plain copy moves as many bytes as the work, since a smaller copy is slower per byte."""
    work = contest.work
    if work is None or work.ceiling != COPY:
        return contest
    half = int(work.amount) // 2
    copy = copying(torch.empty(half, dtype=torch.uint8, device=device))
    return dataclasses.replace(
        contest, runs={**contest.runs, COPY: copy}, work=dataclasses.replace(work, ceiling_amount=2 * half)
    )


def with_each_backend(contest: Contest, op: str, device: torch.device) -> Contest:
    """The contest, with ours on each GPU backend that can run here."""
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
    """The chosen backend is the fastest or nearly so."""
    return tuple(Mark("within", 1.03, name) for name in contestants if name.removeprefix(f"{OURS}, ") in KERNELS)


def cooler(device: torch.device) -> Callable[[], object]:
    """Fills the L2 cache with other data. It only reads, since written data would be flushed during the next run."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device=device).view(torch.float32).zero_().sum


@contextlib.contextmanager
def on_its_own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU everything inside runs on one stream of the bench, since the default stream cannot be captured.

    Memory that earlier workloads left in torch's cache is freed first.
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
    """The best the device reaches: GB/s of a large copy (read plus write) and TFLOP/s of a bf16 matrix product."""
    with on_its_own_stream(device):
        left, right = torch.randn(2, PRODUCT, PRODUCT, dtype=torch.bfloat16, device=device)
        product = torch.empty_like(left)

        def multiply() -> Results:
            torch.mm(left, right, out=product)
            return ()

        copy = copying(torch.empty(COPY_BYTES, dtype=torch.uint8, device=device))
        copy(), multiply()  # cuBLAS allocates its workspace outside of a capture
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
    """The driver's version from nvidia-smi; None without that program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else None
