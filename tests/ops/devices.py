"""Where the op tests run: a test of a GPU's backend on the GPU or, where there is none, under Triton's interpreter or
CUDA's emulation (tests/cuda).
"""

import sys

import emulation
import torch

from rlhf_fast.ops._dispatch import ENGINES, Engine

GPU = torch.cuda.is_available()
GPU_BACKENDS = ("triton", "cuda") if sys.platform == "linux" else ()  # which is where they are


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
