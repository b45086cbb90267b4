"""The counter by which the last block of a launch knows that it is the last. Needs no Triton: the CUDA kernels use it
too.
"""

import functools

import torch
from torch import Tensor


def ticket_of(device: torch.device) -> Tensor:
    """An int32 on the device, 0 before and after each launch.

    There is one per stream, because launches on a stream do not overlap. A captured graph may run on any stream, so it
    gets its own.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    return _ticket(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _ticket(device: torch.device, stream: int) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=device)
