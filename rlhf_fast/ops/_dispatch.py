"""The choice of the backend that runs an op. No other module makes it.

An op has a torch reference and, if it has kernels, a fused implementation: ``@implements("gae", "torch")`` and
``@implements("gae", "fused")``. The fused one calls launchers, which an engine runs: native, cuda or triton. Every
engine has every launcher of kernels/records.py, so the choice depends only on the device and on a forced backend.

``implementation`` chooses torch or fused for a call. ``launch`` chooses the engine for each launch, because a backward
or a compiled graph may run later, on another thread.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_fast.kernels.records import NAMES, Record

from ._checks import under_torch_func
from ._cuda import Cuda
from ._native import native
from ._triton import Triton

Implementation = Callable[..., Any]


class Engine(Protocol):
    """Runs launchers."""

    def why_not(self, device: torch.device) -> str | None:
        """Why the engine cannot run on this device; None if it can."""

    def launch(self, launcher: str, record: Record) -> None:
        """Runs the launcher of this name, on the current device."""


BACKENDS = ("cuda", "triton", "native", "torch")
# The engines of each device, best first. Tests add an engine (CUDA emulated on the CPU), which runs only if it is
# forced. cuda comes before triton because a Triton launch runs slow Python code; neither has been timed on a GPU yet.
ENGINES: dict[str, dict[str, Engine]] = {
    "cpu": {"native": native},
    "cuda": {"cuda": Cuda(native.module, native.reason), "triton": Triton()},
}
_table: dict[str, dict[str, Implementation]] = {}
_forced: str | None = None  # a plain global, so that torch.compile guards on it
_warned: set[tuple[str, str]] = set()


def implements(op: str, kind: str) -> Callable[[Implementation], Implementation]:
    """Decorator: this function is the "torch" or the "fused" implementation of ``op``."""

    def register(function: Implementation) -> Implementation:
        _table.setdefault(op, {})[kind] = function
        return function

    return register


def implementation(op: str, like: Tensor) -> Implementation:
    """The implementation of ``op`` for tensors like this one: the forced backend's, else the first that can run.

    float64 always runs the torch reference. pairwise_loss and dpo_loss, which take one number per sequence, exist only
    in torch, whatever backend is forced.

    Raises RuntimeError when a forced backend cannot run. Warns once for each op and backend that is skipped because it
    cannot run.
    """
    row = _table[op]
    if "fused" not in row:
        return row["torch"]
    forced, device = forced_backend(), like.device
    kind = "torch" if forced == "torch" or like.dtype == torch.float64 else "fused"
    for name in _meant_for(device) if forced is None else (forced,):
        reason = _why_not(op, name, device)
        if reason is None:
            return row[kind]
        if forced is not None:
            raise RuntimeError(
                f"{op}: backend {forced!r} was asked for and cannot run on {device.type}: {reason}. "
                "Unset RLHF_FAST_BACKEND (or leave use_backend) to let rlhf-fast choose."
            )
        _say_once(op, name, reason)
    return row["torch"]


def launch(record: Record, like: Tensor) -> None:
    """Runs the launcher of this record on the device of ``like``, on the forced engine or the first that can run.

    Raises RuntimeError if none can, such as for a graph that was compiled when the backend was available.
    """
    if like.is_cpu and len(ENGINES["cpu"]) == 1:  # the only engine; the general way takes a microsecond
        (only,) = ENGINES["cpu"].values()
        return only.launch(NAMES[type(record)], record)
    device = like.device
    engines, forced = ENGINES[device.type], forced_backend()
    names = (forced,) if forced in engines else _meant_for(device)
    engine = next((engines[name] for name in names if engines[name].why_not(device) is None), None)
    if engine is None:
        raise RuntimeError(f"{NAMES[type(record)]}: no engine can run on {device}")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # kernels are launched on the current device
            engine.launch(NAMES[type(record)], record)
    else:
        engine.launch(NAMES[type(record)], record)


def backends(device: str | torch.device | None = None) -> dict[str, dict[str, Any]]:
    """For each op: the chosen backend, the available ones, and why the others are unavailable.

    Args:
        device: the device of the tensors; the default is CUDA if there is one, else the CPU.

    Returns:
        dict: op to ``{"chosen": name, "available": [names], "unavailable": {name: reason}}``. "chosen" is None when
        RLHF_FAST_BACKEND or ``use_backend`` forces a backend that cannot run, or where there is no such device.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    absent = None
    if where.type == "cuda" and not torch.cuda.is_available():
        absent = f"torch {torch.__version__} sees no CUDA device here"
    listing: dict[str, dict[str, Any]] = {}
    for op in sorted(_table):
        reasons = {name: absent or _why_not(op, name, where) for name in BACKENDS}
        available = [name for name, reason in reasons.items() if reason is None]
        forced = forced_backend() if "fused" in _table[op] else None
        wanted = forced or next((name for name in (*_meant_for(where), "torch") if name in available), None)
        listing[op] = {
            "chosen": wanted if wanted in available else None,
            "available": available,
            "unavailable": {name: reason for name, reason in reasons.items() if reason is not None},
        }
    return listing


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend inside the block, in every thread: ``with rlhf_fast.use_backend("torch"): ...``.

    Raises ValueError for a name that is no backend. An op that the backend cannot run raises RuntimeError when called.
    """
    global _forced
    outer, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = outer


def forced_backend() -> str | None:
    """The backend forced by ``use_backend``, else by RLHF_FAST_BACKEND, else None.

    A compiled graph keeps the RLHF_FAST_BACKEND that it was compiled under; ``use_backend`` still applies to it.
    """
    if _forced is not None:
        return _forced
    outer = os.environ.get("RLHF_FAST_BACKEND")
    return _checked(outer) if outer else None


def _say_once(op: str, name: str, reason: str) -> None:
    if (op, name) not in _warned:
        _warned.add((op, name))
        warnings.warn(f"{op}: backend {name!r} cannot run here and is skipped: {reason}", stacklevel=4)


# Makes torch.compile run _say_once while tracing; a traced warning would break the graph. This is what
# torch.compiler.assume_constant_result sets, but that decorator imports the compiler.
_say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"expected a backend out of {', '.join(BACKENDS)}; got {name!r}")
    return name


def _meant_for(device: torch.device) -> tuple[str, ...]:
    """The engines that may run on this device without being forced, best first."""
    return ("cuda", "triton") if device.type == "cuda" else ("native",)


def _why_not(op: str, name: str, device: torch.device) -> str | None:
    if name == "torch":
        return None
    if "fused" not in _table[op]:
        return f"has no {op}"
    if op != "gae" and under_torch_func():  # gae has no gradient, and vmap runs it slice by slice
        return "torch.func transforms only the torch reference"
    engines = ENGINES.get(device.type, {})
    if name not in engines:
        return f"runs on {'the CPU' if name == 'native' else 'CUDA'}; the tensors are on {device.type}"
    return engines[name].why_not(device)
