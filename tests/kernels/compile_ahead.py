"""Every Triton kernel compiled as its launcher would launch it, on a machine without a GPU.

    python tests/kernels/compile_ahead.py sm_90       -> one line of JSON a kernel and specialisation
    python tests/kernels/compile_ahead.py --renew     -> budget.json anew, of all targets
    python tests/kernels/compile_ahead.py --extend    -> budget.json to hold for this version of Triton as well

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
from pathlib import Path
from typing import Any

from budget import TARGETS, Budget, extended, read_budget, write_budget

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # which Triton reads when a kernel is defined

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


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
    return [{"kernel": name, "wide": wide, **report(kernel)} for name, kernel, wide in kernels.values()]


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
    command = [CUOBJDUMP, "-res-usage", _cubin()]
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


def extend(budget: Budget) -> None:
    """Writes the budget, and what this version of Triton needs beyond it."""
    here = [sys.executable, __file__]
    runs = {target: subprocess.Popen([*here, target], stdout=subprocess.PIPE, text=True) for target in TARGETS}
    for target, run in runs.items():
        output, _ = run.communicate()
        if run.returncode != 0:
            raise SystemExit(f"compile_ahead: {target} failed; budget.json is as it was")
        budget = extended(budget, [json.loads(line) for line in output.splitlines()], target)
    write_budget(budget)


if __name__ == "__main__":
    if sys.argv[1:] == ["--renew"]:
        extend({})
    elif sys.argv[1:] == ["--extend"]:
        extend(read_budget())
    elif len(sys.argv) == 2 and sys.argv[1] in TARGETS:
        for found in compile_all(gpu_target(sys.argv[1])):
            print(json.dumps(found))
    else:
        raise SystemExit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)}|--renew|--extend")
