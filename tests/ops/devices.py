"""Where the op tests run: a test of a GPU's backend on the GPU or, where there is none, under Triton's interpreter."""

import sys

import torch

GPU = torch.cuda.is_available()
GPU_BACKENDS = ("triton",) if sys.platform == "linux" else ()  # which is where Triton is


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend in GPU_BACKENDS else "cpu"


def interpreted(backend: str) -> bool:
    """The interpreter takes about a millisecond an operation: such tests are kept small."""
    return not GPU and backend in GPU_BACKENDS


def seeded(seed: int) -> torch.Generator:
    """A generator on the device that the test runs on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
