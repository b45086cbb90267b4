"""Which engine runs a launcher: the compiled module on CPU tensors, Triton's kernels on CUDA tensors."""

from typing import Any

import torch
from torch import Tensor

from . import _native, _triton
from ._dispatch import forced_backend


def routed(launcher: str, *arguments: Any) -> None:
    """Calls ``launcher`` of csrc/rlhf_fast.h, or its namesake in kernels/, with tensors, numbers and None.

    The device of the first tensor decides; under the interpreter CPU tensors go to Triton where it is forced.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if device.type == "cuda":
        if device.index == torch.cuda.current_device():
            _triton.launch(launcher, *arguments)
        else:
            with torch.cuda.device(device):  # Triton launches on the current one
                _triton.launch(launcher, *arguments)
    elif _triton.INTERPRETED and forced_backend() == "triton":
        _triton.launch(launcher, *arguments)
    else:
        _native.launch(launcher, *arguments)


# A torch without a GPU need not ask, which would take a microsecond a call.
launch = routed if torch.version.cuda or torch.version.hip or _triton.INTERPRETED else _native.launch
