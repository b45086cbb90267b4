"""Imports the Triton kernels of kernels/. No other module does."""

import functools
import importlib
import importlib.util
from typing import Any

import torch

from rlhf_fast.kernels.records import Record

INSTALLED = importlib.util.find_spec("triton") is not None
OLDEST = 8  # the first compute capability with bfloat16
# The files of launchers that are not named after an op.
_FILES = {"masked_moments": "masked_whiten"}


class Triton:
    """The launchers of kernels/: ``gae`` is in kernels/gae.py, ``token_kl_backward`` in kernels/token_kl.py."""

    def why_not(self, device: torch.device) -> str | None:
        if not INSTALLED:
            return "Triton is not installed: pip install triton"
        # of the calls that return the capability, torch.compile treats only this one as a constant
        found = torch.cuda.get_device_properties(device)
        if found.major < OLDEST:
            return f"needs compute capability {OLDEST}.0 or newer; {found.name} has {found.major}.{found.minor}"
        return None

    def launch(self, launcher: str, record: Record) -> None:
        launcher_of(launcher)(record)


@functools.cache
def launcher_of(name: str) -> Any:
    file = _FILES.get(name, name.removesuffix("_backward"))
    return getattr(importlib.import_module(f"rlhf_fast.kernels.{file}"), name)
