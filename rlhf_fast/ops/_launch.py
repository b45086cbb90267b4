"""Which engine runs a launcher: the compiled module on CPU tensors, its CUDA kernels or Triton's on CUDA tensors."""

from typing import Any

import torch
from torch import Tensor

from . import _cuda, _native, _triton
from ._dispatch import forced_backend


def routed(launcher: str, *arguments: Any) -> None:
    """Calls ``launcher`` of csrc/rlhf_fast.h, or its namesake in kernels/, with tensors, numbers and None.

    The device of the first tensor decides; CPU tensors go to an emulated or interpreted engine where that is forced.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    engine = _engine(launcher, device)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # a kernel is launched on the current one
            engine.launch(launcher, *arguments)
    else:
        engine.launch(launcher, *arguments)


def _engine(launcher: str, device: torch.device) -> Any:
    forced = forced_backend()
    if device.type == "cuda":
        return _cuda if forced != "triton" and _cuda.runs(launcher, device) else _triton
    if forced == "cuda" and _cuda.EMULATED:
        return _cuda
    return _triton if forced == "triton" and _triton.INTERPRETED else _native


# A torch without a GPU need not ask, which would take a microsecond a call.
launch = routed if torch.version.cuda or torch.version.hip or _triton.INTERPRETED else _native.launch
