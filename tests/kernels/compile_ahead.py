"""Every Triton kernel compiled as its launcher would launch it, on a machine without a GPU.

    python tests/kernels/compile_ahead.py sm_90       -> one line of JSON a kernel and specialisation
    python tests/kernels/compile_ahead.py --renew     -> budget.json anew, of all targets
    python tests/kernels/compile_ahead.py --extend    -> budget.json to hold for this version of Triton as well
    python tests/kernels/compile_ahead.py --roofline  -> the table of Triton kernels in docs/roofline.md anew

The public functions run on CPU tensors with the triton backend forced; in place of a launch each kernel is compiled for
the target named, with what Triton would specialise on: dtypes, sizes that are 1 or divisible by 16, alignments. What
the functions return is whatever lay in memory. A process of its own, because the tests beside it have Triton interpret
the kernels.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton_roofline
from budget import TARGETS, Budget, extended, read_budget, write_budget

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # which Triton reads when a kernel is defined

import cubin
import torch
import triton
from limits import GPUS
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def gpu_target(name: str) -> GPUTarget:
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


class Driver:
    """What the compiler asks of an active driver."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_all(target: GPUTarget) -> list[dict[str, Any]]:
    """A report of each kernel and specialisation."""
    from calls import calls, triton_forced

    driver.set_active(Driver(target))
    kernels: dict[str, tuple[str, Any, bool]] = {}
    run = JITFunction.run

    def compile_instead(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        name = f"{self.__module__.rpartition('.')[2]}.{self.__name__}"
        kernels.setdefault(kernel.hash, (name, kernel, call.wide))

    JITFunction.run = compile_instead
    with triton_forced():
        for call in calls():
            call.run()
    reports = [{"kernel": name, "wide": wide, **report(kernel)} for name, kernel, wide in kernels.values()]
    if target.backend == "cuda":
        add_paths(reports, [kernel for _, kernel, _ in kernels.values()], target)
    return reports


def add_paths(reports: list[dict[str, Any]], kernels: list[Any], target: GPUTarget) -> None:
    """Adds to a report its row in the table of docs/roofline.md, if it has one; threads of a program; and what
    sass.path says.
    """
    in_table = []
    for report, kernel in zip(reports, kernels, strict=True):
        report["row"] = triton_roofline.row_of(report["kernel"], report["form"], report["wide"])
        report["threads"] = 32 * kernel.metadata.num_warps
        if report["row"] is not None:
            in_table.append((report, cubin.code_of(kernel.asm["cubin"])))
    # the instructions of one architecture alone are in its variant with an a
    architecture = f"{target.arch}a" if target.arch >= 90 else str(target.arch)
    codes = cubin.disassembled([code for _, code in in_table], architecture, TOOLS / "nvdisasm")
    for (report, _), code in zip(in_table, codes, strict=True):
        report |= triton_roofline.path(report["kernel"], report["row"], code)


def form(kernel: Any) -> str:
    """What sets a specialisation apart: the types of its arguments, and the values that are constants."""
    names = list(kernel.src.signature)
    constants = {names[place]: value for (place, *_), value in kernel.src.constants.items()}
    return " ".join(f"{name}={constants.get(name, type)}" for name, type in kernel.src.signature.items())


def report(kernel: Any) -> dict[str, Any]:
    """Of a compiled kernel: its form; registers a thread; bytes of stack, local memory, spills and shared memory; how
    wide its widest global load and store are, in bits.
    """
    found = _of_cubin(kernel) if "cubin" in kernel.asm else _of_amdgcn(kernel)
    return {"triton": triton.__version__, "form": form(kernel), **found, "shared": kernel.metadata.shared}


@functools.cache
def _cubin() -> Path:
    return Path(tempfile.mkdtemp(prefix="compile_ahead")) / "kernel.cubin"


def _of_cubin(kernel: Any) -> dict[str, int]:
    _cubin().write_bytes(kernel.asm["cubin"])
    command = [TOOLS / "cuobjdump", "-res-usage", _cubin()]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    found = {"registers": used["REG"], "stack": used["STACK"], "local": used["LOCAL"], "spills": 0}  # on the stack
    for name, instruction in (("load", "ld"), ("store", "st")):
        accesses = re.findall(rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b", kernel.asm["ptx"])
        found[name] = max((int(lanes or 1) * int(bits) for lanes, bits in accesses), default=0)
    return found


def _of_amdgcn(kernel: Any) -> dict[str, int]:
    code = kernel.asm["amdgcn"]
    used = {key: int(value) for key, value in re.findall(r"^ +\.(\w+): +(\d+)$", code, re.MULTILINE)}
    found = {
        "registers": used["vgpr_count"],
        "stack": used["private_segment_fixed_size"],
        "local": 0,
        "spills": 4 * (used["vgpr_spill_count"] + used["sgpr_spill_count"]),
    }
    for name in ("load", "store"):
        accesses = re.findall(rf"\b(?:global|buffer)_{name}_(?:dwordx?|\w+?)(\d?)\b", code)
        found[name] = max((32 * int(words or 1) for words in accesses), default=0)
    return found


def compile_for(targets: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Target -> what compile_all says of it. The targets are compiled in processes side by side."""
    here = [sys.executable, __file__]
    runs = {target: subprocess.Popen([*here, target], stdout=subprocess.PIPE, text=True) for target in targets}
    outputs = {target: run.communicate()[0] for target, run in runs.items()}
    if failed := [target for target, run in runs.items() if run.returncode != 0]:
        raise SystemExit(f"compile_ahead: {', '.join(failed)} failed; nothing was written")
    return {target: [json.loads(line) for line in output.splitlines()] for target, output in outputs.items()}


def extend(budget: Budget) -> None:
    """Writes the budget, and what this version of Triton needs beyond it."""
    for target, reports in compile_for(TARGETS).items():
        budget = extended(budget, reports, target)
    write_budget(budget)


if __name__ == "__main__":
    if sys.argv[1:] == ["--renew"]:
        extend({})
    elif sys.argv[1:] == ["--extend"]:
        extend(read_budget())
    elif sys.argv[1:] == ["--roofline"]:
        triton_roofline.renew(compile_for({f"sm_{gpu.architecture}" for gpu in GPUS}))
    elif len(sys.argv) == 2 and sys.argv[1] in TARGETS:
        for found in compile_all(gpu_target(sys.argv[1])):
            print(json.dumps(found))
    else:
        raise SystemExit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)}|--renew|--extend|--roofline")
