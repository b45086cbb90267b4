"""Which backend runs an op, decided here alone.

An op has a torch reference and, where it has kernels, a fused implementation: ``@implements("gae", "torch")`` and
``@implements("gae", "fused")``. Every engine has every launcher of kernels/records.py, so that which of them runs is a
matter of the device, and of a backend that is forced: ``implementation`` asks for a call, ``launch`` for each launch in
it (a backward or a compiled graph may come later, on another thread).
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
    """What runs launchers."""

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run there; None where it can."""

    def launch(self, launcher: str, record: Record) -> None:
        """Runs the launcher of this name, on the current device."""


BACKENDS = ("cuda", "triton", "native", "torch")
# The engines of each device, best first. Another engine can be added from outside (the tests emulate CUDA on the CPU);
# it runs only if it is forced. cuda comes before triton, whose launch is slow Python code, until both are timed on a
# GPU.
ENGINES: dict[str, dict[str, Engine]] = {
    "cpu": {"native": native},
    "cuda": {"cuda": Cuda(native.module, native.reason), "triton": Triton()},
}
_table: dict[str, dict[str, Implementation]] = {}
_forced: str | None = None  # a plain global, which torch.compile guards on
_warned: set[tuple[str, str]] = set()


def implements(op: str, kind: str) -> Callable[[Implementation], Implementation]:
    """Decorator: this function is the "torch" or the "fused" implementation of ``op``."""

    def register(function: Implementation) -> Implementation:
        _table.setdefault(op, {})[kind] = function
        return function

    return register


def implementation(op: str, like: Tensor) -> Implementation:
    """The function that runs ``op`` on tensors like this one: the forced backend's, else the first that can run.

    float64 is the torch reference on every backend: it is the truth that the others are held to. An op of a number a
    sequence (pairwise_loss, dpo_loss) exists in torch alone, and no forced backend changes that.

    Raises RuntimeError when a forced backend cannot run; warns once when one is passed over.
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

    Raises RuntimeError where none can: a graph compiled for a backend that has gone.
    """
    if like.is_cpu and len(ENGINES["cpu"]) == 1:  # no choice to make; asking would take a microsecond
        (only,) = ENGINES["cpu"].values()
        return only.launch(NAMES[type(record)], record)
    device = like.device
    engines, forced = ENGINES[device.type], forced_backend()
    names = (forced,) if forced in engines else _meant_for(device)
    engine = next((engines[name] for name in names if engines[name].why_not(device) is None), None)
    if engine is None:
        raise RuntimeError(f"{NAMES[type(record)]}: no engine can run on {device}")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # a kernel is launched on the current one
            engine.launch(NAMES[type(record)], record)
    else:
        engine.launch(NAMES[type(record)], record)


def backends(device: str | torch.device | None = None) -> dict[str, dict[str, Any]]:
    """What is available per op, what is chosen, and why not the others.

    Args:
        device: where the tensors would be; the default is CUDA where there is one, else the CPU.

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

    A compiled graph keeps to the RLHF_FAST_BACKEND that it was compiled under; ``use_backend`` reaches it at any time.
    """
    if _forced is not None:
        return _forced
    outer = os.environ.get("RLHF_FAST_BACKEND")
    return _checked(outer) if outer else None


def _say_once(op: str, name: str, reason: str) -> None:
    if (op, name) not in _warned:
        _warned.add((op, name))
        warnings.warn(f"{op}: backend {name!r} cannot run here and is passed over: {reason}", stacklevel=4)


# Runs while torch.compile traces, whose graph a warning would break. It is torch.compiler.assume_constant_result, less
# that decorator's import of the compiler.
_say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"expected a backend out of {', '.join(BACKENDS)}; got {name!r}")
    return name


def _meant_for(device: torch.device) -> tuple[str, ...]:
    """The engines that run there unasked, best first."""
    return ("cuda", "triton") if device.type == "cuda" else ("native",)


def _why_not(op: str, name: str, device: torch.device) -> str | None:
    if name == "torch":
        return None
    if "fused" not in _table[op]:
        return f"has no {op}"
    if op != "gae" and under_torch_func():  # gae has no gradient, and vmap calls it by slices
        return "torch.func transforms the torch reference alone"
    engines = ENGINES.get(device.type, {})
    if name not in engines:
        return f"runs on {'the CPU' if name == 'native' else 'CUDA'}; the tensors are on {device.type}"
    return engines[name].why_not(device)
