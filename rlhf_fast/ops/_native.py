"""Loads the compiled engine, rlhf_fast._C, and calls its CPU launchers (_cuda.py calls those for CUDA).

No other module imports rlhf_fast._C. The launchers read and write raw memory: the public functions check all arguments.
"""

import hashlib
import importlib
import os
import struct
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.kernels import records

_PACKAGE = Path(__file__).parent.parent


def _load() -> tuple[Any, str | None]:
    """The compiled module and None, or None and the reason why it cannot be used."""
    wanted = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
    built = sorted(path.name for path in _PACKAGE.glob("_C.*"))
    damaged = f"the compiled module {wanted} cannot be loaded ({{}}); install rlhf-fast again"
    if not built:
        return None, "not compiled: install a C++ compiler and rlhf-fast again (without RLHF_FAST_NATIVE=0)"
    if wanted not in built:
        there = ", ".join(built)
        return None, f"compiled for another Python: there is {there}, this one needs {wanted}; install rlhf-fast again"
    if _is_cut_short(_PACKAGE / wanted):
        return None, damaged.format("its end is missing")
    try:
        # torch is loaded before, so that the engine uses torch's OpenMP threads
        module = importlib.import_module("rlhf_fast._C")
    except ImportError as error:
        return None, damaged.format(error)
    sources = _interface()
    if getattr(module, "records", None) != records.digest() or sources not in (None, module.interface):
        return None, f"the compiled module {wanted} is from other sources than csrc/; run make or install it again"
    return module, None


def _is_cut_short(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section table does; loading such a file would crash the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02" or len(header) < 64:
        return False  # the loader reports what is wrong with it
    (table,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < table + size * count


def _interface() -> str | None:
    """The hash of the interface's sources, computed as in CMakeLists.txt; None without a checkout."""
    sources = [_PACKAGE.parent / "csrc" / name for name in ("records.h", "rlhf_fast.h", "bindings.cpp")]
    if not all(source.exists() for source in sources):
        return None
    return "".join(hashlib.sha256(source.read_bytes()).hexdigest() for source in sources)


_module, _reason = _load()


if _module is not None and (_path := os.environ.get("RLHF_FAST_CPU_PATH")):
    _module.choose_path(_path)


class Native:
    """The launchers of csrc/cpu."""

    def __init__(self, module: Any, reason: str | None) -> None:
        self.module, self.reason = module, reason

    def why_not(self, device: torch.device) -> str | None:
        return self.reason

    def launch(self, launcher: str, record: records.Record) -> None:
        getattr(self.module, launcher)(record, torch.get_num_threads())


native = Native(_module, _reason)


def bfloat16_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """left (n, k) x right (m, k)^T, bfloat16, into float32 ``out`` (n, m); all three have contiguous columns."""
    _module.bfloat16_product(
        *out.shape, left.shape[1], left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), out.data_ptr(),
        out.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def float32_product(out: Tensor, left: Tensor, right: Tensor, scale: float, add: bool) -> None:
    """``out`` (n, m) = scale * left (n, k) x right (k, m), or += with ``add``; float32, columns of out contiguous."""
    _module.float32_product(
        *out.shape, left.shape[1], left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride(), out.data_ptr(),
        out.stride(0), scale, add, torch.get_num_threads(),
    )  # fmt: skip


def multiplies_float32() -> bool:
    """Whether float32 products are computed by the engine, not by torch; depends on the maker of the processor."""
    return _module is not None and bool(_module.multiplies_float32())


multiplies_float32._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile cannot look inside


def multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions, which make torch's bfloat16 products faster than float32."""
    return bool(_module.multiplies_bfloat16())


def build_info() -> dict[str, Any]:
    """What was compiled: CPU paths and the one in use, compiler, OpenMP, CUDA and its architectures; and which library
    computes float32 products on this processor ("rlhf-fast" or "torch").

    ``{"native": None, "reason": ...}`` if the compiled module is missing or cannot be loaded.
    """
    if _module is None:
        return {"native": None, "reason": _reason}
    return {"native": Path(_module.__file__).name, **_module.build_info()}
