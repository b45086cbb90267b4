"""`rlhf-fast bench`: selects the workloads, measures them, and writes the requested files."""

import importlib
import importlib.util
import json
import math
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from rlhf_fast import build_info
from rlhf_fast.bench import chart, harness, peers, report, results
from rlhf_fast.bench import device as gpu
from rlhf_fast.bench.workload import Workload
from rlhf_fast.errors import UserError, nearest
from rlhf_fast.files import write_atomic

BENCHES = (
    "masked_logprobs",
    "linear_logprobs",
    "linear_cross_entropy",
    "linear_policy_loss",
    "linear_policy_ref",
    "lora_linear",
    "token_kl",
    "exact_kl",
    "gae",
    "masked_whiten",
    "clipped_policy_loss",
    "clipped_value_loss",
    "ppo_loss",
    "rms_norm",
    "gated_activation",
    "rotary_embedding",
    "overhead",
)


def bench(flags: dict[str, Any]) -> None:
    """Runs the command with the given flags."""
    if "list" in flags:
        listed = chosen(flags.get("only"), known_device(flags.get("device", "cpu")))
        print("\n".join(f"{workload.name(workload.sizes)}{marks_of(workload)}" for workload in listed))
        return
    device = checked_device(flags.get("device", "cpu"))
    workloads = chosen(flags.get("only"), device)
    files = {name: Path(flags[name]) for name in WRITERS if name in flags}
    if "json" in files and files["json"].is_dir():
        files["json"] /= results_name(device)
    check_writable(files)
    threads = flags.get("threads", torch.get_num_threads())
    if threads < 1:
        raise UserError(f"--threads must be 1 or more; got {threads}")
    torch.set_num_threads(threads)

    measured = run(workloads, device, "quick" in flags, files.get("json"))
    for name, path in files.items():
        WRITERS[name](path, measured)
        print(f"wrote {path}")
    if measured["failed"]:
        raise RuntimeError(f"{len(measured['failed'])} workloads failed: {'; '.join(measured['failed'])}")


def chosen(only: str | None, device: torch.device) -> list[Workload]:
    """The workloads for the device of the benches named in ``only``, A,B; all when None."""
    names = BENCHES if only is None else tuple(name.strip() for name in only.split(","))
    for name in names:
        if name not in BENCHES:
            near = nearest(name, [*BENCHES])
            raise UserError(f"--only: there is no bench {name!r}{near}; there are {', '.join(BENCHES)}")
    modules = [importlib.import_module(f"rlhf_fast.bench.bench_{name}") for name in names]
    listing = "GPU_WORKLOADS" if device.type == "cuda" else "WORKLOADS"
    return [workload for module in modules for workload in getattr(module, listing)]


def marks_of(workload: Workload) -> str:
    return "".join(f"\n    {mark}" for mark in workload.marks)


def known_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    return device


def checked_device(name: str) -> torch.device:
    device = known_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def results_name(device: torch.device) -> str:
    """cpu.json, or gpu-h100-80gb-hbm3.json of an NVIDIA H100 80GB HBM3."""
    if device.type == "cpu":
        return "cpu.json"
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower().removeprefix("nvidia"))
    return f"gpu-{'-'.join(words)}.json"


def check_writable(files: dict[str, Path]) -> None:
    """Checked before the minutes of measuring, not after."""
    for name, path in files.items():
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"--{name} must be a file in a folder that exists; got {str(path)!r}")
    if "chart" in files and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--chart draws with matplotlib, which is not installed: pip install matplotlib")


def run(workloads: list[Workload], device: torch.device, quick: bool, kept: Path | None = None) -> dict[str, Any]:
    """Measures, telling each row as it is done; ``kept`` has the rows so far. At the end, also of a run that is
    interrupted, comes the verdict.

    Where ours fails, the row is left out, and the reason stands under "failed".
    """
    start = perf_counter()
    names = [workload.name(workload.quick if quick else workload.sizes) for workload in workloads]
    machine, on_gpu = results.machine(), device.type == "cuda"
    measured: dict[str, Any] = {
        "machine": {**machine, "versions": {**machine["versions"], **peers.versions()}},
        "device": device.type,
        "quick": quick,
        "build": build_info(),
        **({"gpu": rounded(gpu.described(device)), "ceilings": rounded(gpu.ceilings(device))} if on_gpu else {}),
        "rows": [],
        "failed": {},
        "pending": names,
    }
    try:
        for number, (workload, name) in enumerate(zip(workloads, names, strict=True)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # output of other libraries and compilers
                try:
                    measured["rows"].append(rounded(harness.measure(workload, device, quick)))
                    print(report.lines(measured["rows"][-1]) + "\n", flush=True)
                except Exception as error:
                    measured["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
            measured |= {"seconds": round(perf_counter() - start), "pending": names[number + 1 :]}
            if kept:
                WRITERS["json"](kept, measured)
    finally:
        print(report.verdict(measured), flush=True)
    return measured


def rounded(value: Any) -> Any:
    """Floats rounded to four digits, more than their precision; NaN and inf, which JSON lacks, become None."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


WRITERS: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    "json": lambda path, measured: write_atomic(path, json.dumps(measured, indent=1) + "\n"),
    "markdown": lambda path, measured: path.write_text(report.details(measured)),
    "chart": lambda path, measured: chart.draw(measured, path),
}
