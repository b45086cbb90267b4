"""Every Triton kernel compiled as its launcher would launch it, on a machine without a GPU.

    python tests/kernels/compile_ahead.py 90      -> one line of JSON a kernel and specialisation

The public functions run on CPU tensors with the triton backend forced; in place of a launch each kernel is compiled for
the architecture named, with what Triton would specialise on: dtypes, sizes that are 1 or divisible by 16, alignments.
A process of its own, because the tests beside it have Triton interpret the kernels.
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

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent / "ops"))
from op_table import OPS, make, outputs_and_grads  # noqa: E402

from rlhf_fast.ops import _launch, _triton, use_backend  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Driver:
    """What the compiler asks of an active driver."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_all(architecture: int) -> dict[str, Any]:
    """Kernel and specialisation -> what it was compiled to."""
    driver.set_active(Driver(architecture))
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_instead(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled[f"{self.__name__} {kernel.hash}"] = kernel
        return kernel

    JITFunction.run = compile_instead
    # CPU tensors may go to kernels that are compiled and never launched
    _triton.INTERPRETED = True
    _triton._probe.cache_clear()
    for launcher_user in sys.modules.values():
        if getattr(launcher_user, "__package__", None) == "rlhf_fast.ops._fused" and hasattr(launcher_user, "launch"):
            launcher_user.launch = _launch.routed
    with use_backend("triton"):
        for op in OPS:
            for dtype in DTYPES:
                for shape, vocab in (((2, 3), 1000), ((2, 1024), 1008), ((1, 2), 151936)):
                    if vocab == 1008 or op.has_vocabulary or shape == (2, 3):
                        case = make(op, shape, dtype, vocab=vocab)
                        outputs_and_grads(op.run, op, case, case.mask)
    return compiled


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


def report(name: str, kernel: Any) -> dict[str, Any]:
    """Registers, stack, local and shared memory, and how wide the widest global load and store are, in bits."""
    path = folder() / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    code = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return {
        "kernel": name.split()[0],
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "shared": kernel.metadata.shared,
        "load": widest(code, "LDG"),
        "store": widest(code, "STG"),
    }


def widest(code: str, instruction: str) -> int:
    widths = re.findall(rf"\b{instruction}\.E((?:\.\w+)*)", code)
    return max((128 if ".128" in width else 64 if ".64" in width else 32 for width in widths), default=0)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    for name, kernel in compile_all(int(sys.argv[1])).items():
        print(json.dumps(report(name, kernel)))
