"""Which backend runs an op: one table, one function.

An implementation joins the table with ``@implements("gae", "torch")``. A backend other than torch joins with
``register_backend``, whose probe says whether it can run on a device, and why not.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ._checks import under_torch_func

Implementation = Callable[..., Any]
Probe = Callable[[torch.device], str | None]

NAMES = ("cuda", "triton", "native", "torch")
_table: dict[str, dict[str, Implementation]] = {}
_probes: dict[str, Probe] = {"torch": lambda device: None}
_forced: str | None = None  # a plain global, which torch.compile guards on
_warned: set[tuple[str, str]] = set()


def register_backend(name: str, probe: Probe) -> None:
    """Adds a backend. ``probe(device)`` returns None where it can run, else the reason why not."""
    _probes[_checked(name)] = probe


def implements(op: str, *backends: str) -> Callable[[Implementation], Implementation]:
    """Decorator: this function is the implementation of ``op`` on each of ``backends``."""

    def register(function: Implementation) -> Implementation:
        for backend in backends:
            _table.setdefault(op, {})[_checked(backend)] = function
        return function

    return register


def implementation(op: str, like: torch.Tensor) -> Implementation:
    """The function that runs ``op`` on tensors like this one: the forced backend's, else the first that can run.

    float64 is the torch reference on every backend: it is the truth that the others are held to. An op of a number a
    sequence (pairwise_loss, dpo_loss) exists in torch alone, and no forced backend changes that.

    Raises RuntimeError when a forced backend cannot run; warns once when a registered one is passed over.
    """
    forced, device = _forced_for(op), like.device
    if forced is not None:
        reason = _why_not(op, forced, device)
        if reason is not None:
            raise RuntimeError(
                f"{op}: backend {forced!r} was asked for and cannot run on {device.type}: {reason}. "
                "Unset RLHF_FAST_BACKEND (or leave use_backend) to let rlhf-fast choose."
            )
        return _table[op]["torch" if like.dtype == torch.float64 else forced]
    for name in _candidates(device):
        reason = _why_not(op, name, device)
        if reason is None:
            return _table[op]["torch" if like.dtype == torch.float64 else name]
        if name in _table[op]:
            _say_once(op, name, reason)
    raise RuntimeError(f"{op}: no backend can run on {device}")


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
        reasons = {name: absent or _why_not(op, name, where) for name in NAMES}
        available = [name for name, reason in reasons.items() if reason is None]
        wanted = _forced_for(op) or next((name for name in _candidates(where) if name in available), None)
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


def _forced_for(op: str) -> str | None:
    return forced_backend() if len(_table[op]) > 1 else None


def _say_once(op: str, name: str, reason: str) -> None:
    if (op, name) not in _warned:
        _warned.add((op, name))
        warnings.warn(f"{op}: backend {name!r} cannot run here and is passed over: {reason}", stacklevel=4)


# Runs while torch.compile traces, whose graph a warning would break. It is torch.compiler.assume_constant_result, less
# that decorator's import of the compiler.
_say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"expected a backend out of {', '.join(NAMES)}; got {name!r}")
    return name


def _candidates(device: torch.device) -> tuple[str, ...]:
    """The backends meant for a device, best first; another one may run there, slowly, where it is forced."""
    # cuda before triton, whose launch is Python's work, until both are timed on a GPU
    return ("cuda", "triton", "torch") if device.type == "cuda" else ("native", "torch")


def _why_not(op: str, name: str, device: torch.device) -> str | None:
    if name not in _probes:
        return "not part of this build"
    if name not in _table[op]:
        return f"has no {op}"
    if name != "torch" and op != "gae" and under_torch_func():  # gae has no gradient, and vmap calls it by slices
        return "torch.func transforms the torch reference alone"
    return _probes[name](device)
