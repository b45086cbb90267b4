"""The compiled engine, rlhf_fast._C, its only importer, and its launchers for the CPU (those for CUDA are in _cuda.py).

They take raw pointers: all checks were made before.
"""

import hashlib
import importlib
import os
import struct
import sysconfig
from pathlib import Path
from typing import Any

import torch

from ._dispatch import register_backend

_NUMBERS = {int, float, bool}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PACKAGE = Path(__file__).parent.parent


def _load() -> tuple[Any, str | None]:
    """The compiled module and None, or None and why there is none."""
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
        # torch is loaded already, so that both share its OpenMP threads
        module = importlib.import_module("rlhf_fast._C")
    except ImportError as error:
        return None, damaged.format(error)
    sources = _interface()
    if sources is not None and getattr(module, "interface", None) != sources:
        return None, f"the compiled module {wanted} is of another state of csrc/; make, or install rlhf-fast again"
    return module, None


def _is_cut_short(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section table does, at which the system's loader would crash."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02" or len(header) < 64:
        return False  # the loader tells what is wrong with it
    (table,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < table + size * count


def _interface() -> str | None:
    """What the checkout's sources ask for, as CMakeLists.txt forms it; None where there is no checkout."""
    sources = [_PACKAGE.parent / "csrc" / name for name in ("rlhf_fast.h", "bindings.cpp")]
    if not all(source.exists() for source in sources):
        return None
    return "".join(hashlib.sha256(source.read_bytes()).hexdigest() for source in sources)


_module, _reason = _load()


def _probe(device: torch.device) -> str | None:
    if _reason is not None:
        return _reason
    return None if device.type == "cpu" else f"runs on the CPU; the tensors are on {device.type}"


register_backend("native", _probe)
if _module is not None and (_path := os.environ.get("RLHF_FAST_CPU_PATH")):
    _module.choose_path(_path)


def launch(launcher: str, *arguments: Any) -> None:
    """Calls a launcher of csrc/rlhf_fast.h."""
    getattr(_module, launcher)(*addresses(arguments))


def addresses(arguments: tuple[Any, ...]) -> list[Any]:
    """What the compiled module takes: tensors as their data_ptr, None as 0, numbers as they are."""
    return [
        0 if argument is None else argument if type(argument) in _NUMBERS else argument.data_ptr()
        for argument in arguments
    ]


def cuda_engine() -> tuple[Any, str | None]:
    """The launchers for CUDA and None, or None and why there are none."""
    if hasattr(_module, "cuda"):
        return _module.cuda, None
    return None, _reason or "compiled for the CPU alone: install the CUDA toolkit, for its nvcc, and rlhf-fast again"


def dtype_code(dtype: torch.dtype) -> int:
    """The number of ``DType`` in csrc/rlhf_fast.h."""
    return _DTYPES[dtype]


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products, so that torch's are faster than float32 ones."""
    return bool(_module.multiplies_bfloat16())


def build_info() -> dict[str, Any]:
    """What was compiled: CPU paths and the one in use, compiler, OpenMP, CUDA and its architectures.

    ``{"native": None, "reason": ...}`` where the compiled module is missing or cannot be loaded.
    """
    if _module is None:
        return {"native": None, "reason": _reason}
    return {"native": Path(_module.__file__).name, **_module.build_info()}
