"""The Triton kernels of kernels/, and their only importer."""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from ._dispatch import register_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it, when a kernel is defined
INSTALLED = importlib.util.find_spec("triton") is not None
OLDEST = 8  # compute capability, which brought bfloat16
# The files of launchers that do not bear an op's name.
_FILES = {"masked_moments": "masked_whiten"}


def _probe(device: torch.device) -> str | None:
    if not INSTALLED:
        return "Triton is not installed: pip install triton"
    if device.type == "cuda":
        # of all that asks for the capability, this is what torch.compile knows to be constant
        found = torch.cuda.get_device_properties(device)
        if found.major < OLDEST:
            return f"needs compute capability {OLDEST}.0 or newer; {found.name} has {found.major}.{found.minor}"
        return None
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"runs on CUDA (on the CPU under TRITON_INTERPRET=1, slowly); the tensors are on {device.type}"


register_backend("triton", _probe)


def launch(launcher: str, *arguments: Any) -> None:
    """Calls the launcher of kernels/, whose arguments are those of csrc/bindings.cpp with tensors for addresses."""
    _launcher(launcher)(*arguments)


@functools.cache
def _launcher(launcher: str) -> Any:
    file = _FILES.get(launcher, launcher.removesuffix("_backward"))
    return getattr(importlib.import_module(f"rlhf_fast.kernels.{file}"), launcher)
