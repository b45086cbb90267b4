"""The Triton kernels of kernels/, and their only importer."""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from ._dispatch import register_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it, when a kernel is defined
OLDEST = (8, 0)  # compute capability: bfloat16 and 16-byte asynchronous copies
# The files of launchers that do not bear an op's name.
_FILES = {"masked_moments": "masked_whiten"}


@functools.cache
def _probe(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}; {device} has {capability[0]}.{capability[1]}"
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
