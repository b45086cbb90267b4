"""Where the op tests run: a test of a GPU's backend on the GPU or, where there is none, under Triton's interpreter or
CUDA's emulation (tests/cuda).
"""

import sys

import emulation
import torch

from rlhf_fast.kernels.records import LAUNCHERS
from rlhf_fast.ops import _native
from rlhf_fast.ops._dispatch import ENGINES, Engine
from rlhf_fast.ops._triton import launcher_of

GPU = torch.cuda.is_available()
GPU_BACKENDS = ("triton", "cuda") if sys.platform == "linux" else ()  # which is where they are


def without_a_launcher() -> list[str]:
    """The launchers that an engine here lacks, which would be missed only where they are called."""
    compiled = {"native": _native._module, "cuda": getattr(_native._module, "cuda", None)}
    found = [
        f"{backend} has no {name}"
        for backend, module in compiled.items()
        if module is not None
        for name in LAUNCHERS
        if not hasattr(module, name)
    ]
    if "triton" in GPU_BACKENDS:
        found += [f"triton has no {name}" for name in LAUNCHERS if not callable(launcher_of(name))]
    return found


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend in GPU_BACKENDS else "cpu"


def interpreted(backend: str) -> bool:
    """Both are slow, Triton's at about a millisecond an operation: such tests are kept small."""
    return not GPU and backend in GPU_BACKENDS


def seeded(seed: int) -> torch.Generator:
    """A generator on the device that the test runs on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def why_not(backend: str) -> str | None:
    """Why it cannot be tested on this machine."""
    if backend != "cuda":
        return None
    return ENGINES["cuda"]["cuda"].why_not(torch.device("cuda")) if GPU else emulation.missing()


def stand_in(backend: str) -> Engine:
    """What runs a GPU's kernels on CPU tensors."""
    if backend == "cuda":
        return emulation.engine()
    from interpreter import Interpreted  # Triton is not everywhere

    return Interpreted()
