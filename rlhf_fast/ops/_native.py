"""The compiled engine, rlhf_fast._C, and its only importer. It takes raw pointers: all checks were made before."""

import importlib
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._dispatch import register_backend

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _load() -> tuple[Any, str | None]:
    """The compiled module and None, or None and why there is none."""
    try:
        # torch is loaded already, so that both share its OpenMP threads
        return importlib.import_module("rlhf_fast._C"), None
    except ImportError as error:
        here = Path(__file__).parent.parent
        built = sorted(path.name for path in here.glob("_C.*"))
        wanted = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
        if not built:
            return None, "not compiled: install a C++ compiler and rlhf-fast again (without RLHF_FAST_NATIVE=0)"
        if wanted not in built:
            return None, f"compiled for another Python: there is {', '.join(built)}, this one needs {wanted}; reinstall"
        return None, f"the compiled module {wanted} cannot be loaded ({error}); reinstall rlhf-fast"


_module, _reason = _load()


def _probe(device: torch.device) -> str | None:
    if _reason is not None:
        return _reason
    return None if device.type == "cpu" else f"runs on the CPU; the tensors are on {device.type}"


register_backend("native", _probe)
if _module is not None and (_path := os.environ.get("RLHF_FAST_CPU_PATH")):
    _module.choose_path(_path)


def launch(launcher: str, *arguments: Any) -> None:
    """Calls a launcher of csrc/rlhf_fast.h: tensors go as their data_ptr, None as 0."""
    getattr(_module, launcher)(*[
        argument.data_ptr() if isinstance(argument, Tensor) else 0 if argument is None else argument
        for argument in arguments
    ])  # fmt: skip


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
