"""Calls the CUDA launchers of the compiled engine. No other module does."""

from typing import Any

import torch

from rlhf_fast.kernels.records import Record
from rlhf_fast.kernels.ticket import ticket_of

from . import _native


class Cuda:
    """The launchers of csrc/cuda in the compiled module; ``reason`` says why there is no module."""

    def __init__(self, module: Any, reason: str | None) -> None:
        self.launchers: Any = getattr(module, "cuda", None)
        self.reason = reason
        if self.launchers is None and reason is None:
            self.reason = "compiled for the CPU alone: install the CUDA toolkit, for its nvcc, and rlhf-fast again"
        self._cannot_run: dict[int, str | None] = {}

    def why_not(self, device: torch.device) -> str | None:
        if self.reason is not None:
            return self.reason
        return _why_not_there(self, torch.cuda.current_device() if device.index is None else device.index)

    def launch(self, launcher: str, record: Record) -> None:
        """Launches on the current device and torch's current stream.

        Called without scratch memory, a launcher launches if it needs none, else it returns the bytes that it needs.
        Scratch comes from torch's caching allocator, which orders its reuse by stream, so it may be freed right after
        the launch. Every launcher that needs the ticket needs scratch.

        Raises RuntimeError with the launcher's name, its sizes and CUDA's message.
        """
        function, stream = getattr(self.launchers, launcher), self.stream()
        needed = function(record, 0, 0, 0, stream)
        if needed:
            scratch, ticket = self.scratch(needed), self.ticket()
            function(record, scratch.data_ptr(), needed, ticket.data_ptr(), stream)

    def stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())

    def scratch(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cuda")

    def ticket(self) -> torch.Tensor:
        return ticket_of(torch.device("cuda", torch.cuda.current_device()))


def _why_not_there(engine: Cuda, index: int) -> str | None:
    """Why the kernels cannot run on this GPU: they were not compiled for its architecture, or its driver is too old."""
    known = engine._cannot_run
    if index not in known:
        with torch.cuda.device(index):
            error = engine.launchers.cannot_run()
        if error is not None:
            major, minor = torch.cuda.get_device_capability(index)
            there = _native.build_info()["cuda_architectures"]
            error = (
                f"CUDA says: {error}. The engine was compiled for {there} and this is {major}{minor}: update the "
                f"driver, or install rlhf-fast again with RLHF_FAST_CUDA_ARCHS={major}{minor}"
            )
        known[index] = error
    return known[index]


# torch.compile takes the result for a constant, as for _dispatch._say_once.
_why_not_there._dynamo_marked_constant = True  # type: ignore[attr-defined]
