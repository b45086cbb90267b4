"""The CUDA launchers of the compiled engine, and their only caller."""

from typing import Any

import torch

from . import _native
from ._dispatch import register_backend

engine, _reason = _native.cuda_engine()
EMULATED = False  # a test's engine, whose memory is the CPU's
_cannot_run: dict[int, str | None] = {}


def _probe(device: torch.device) -> str | None:
    if engine is None:
        return _reason
    if device.type == "cuda":
        return why_not(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu" and EMULATED:
        return None
    return f"runs on CUDA; the tensors are on {device.type}"


register_backend("cuda", _probe)


def why_not(index: int) -> str | None:
    """Why the kernels cannot run on this GPU: its architecture, or its driver, is none that they were compiled for."""
    if index not in _cannot_run:
        with torch.cuda.device(index):
            error = engine.cannot_run()
        if error is not None:
            major, minor = torch.cuda.get_device_capability(index)
            there = _native.build_info()["cuda_architectures"]
            error = (
                f"CUDA says: {error}. The engine was compiled for {there} and this is {major}{minor}: update the "
                f"driver, or install rlhf-fast again with RLHF_FAST_CUDA_ARCHS={major}{minor}"
            )
        _cannot_run[index] = error
    return _cannot_run[index]


# What torch.compile takes for constant, as _dispatch._say_once.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runs(launcher: str, device: torch.device) -> bool:
    return hasattr(engine, launcher) and _probe(device) is None


def launch(launcher: str, *arguments: Any) -> None:
    """Calls a launcher of csrc/rlhf_fast.h on the current device and its stream. Scratch memory comes from torch,
    so that it is safe to give back as soon as the launch is under way.

    Raises RuntimeError with the op, its sizes and CUDA's text.
    """
    function, addresses = getattr(engine, launcher), _native.addresses(arguments)
    stream = 0 if EMULATED else torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    needed = function(*addresses, 0, 0, stream)
    if needed:
        scratch = torch.empty(needed, dtype=torch.uint8, device="cpu" if EMULATED else "cuda")
        function(*addresses, scratch.data_ptr(), needed, stream)
