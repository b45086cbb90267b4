"""csrc/cuda compiled for the CPU, with the cuda_runtime.h of tests/cuda/emulated: what the op tests run as the backend
"cuda" where there is no GPU.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

from rlhf_fast.ops._cuda import Cuda

ROOT = Path(__file__).parents[2]
EMULATED = ROOT / "tests" / "cuda" / "emulated"
SOURCES = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *EMULATED.glob("*.cpp")]
HEADERS = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h"), *EMULATED.glob("*.h")]
FLAGS = [
    *("-std=c++17", "-O1", "-march=native", "-Werror=switch", "-ffp-contract=fast", "-fno-strict-aliasing", "-fPIC"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fvisibility=hidden", f"-I{EMULATED}"),
    *(f"-I{sysconfig.get_path('include')}", f"-isystem{Path(torch.__file__).parent / 'include'}", "-DRLHF_FAST_CUDA"),
    *(f'-D{name}="emulated"' for name in ("RLHF_FAST_INTERFACE", "RLHF_FAST_COMPILER", "RLHF_FAST_CUDA_COMPILER")),
    '-DRLHF_FAST_CUDA_ARCHITECTURES=""',
]
COMPILER = (os.environ.get("CXX") or "c++").split()[0]
BINDINGS_FLAGS = ["-O0", "-fno-var-tracking"]  # most of the time to compile, and none of the time to run


def missing() -> str | None:
    """Why there is no emulation here."""
    if not EMULATED.exists():
        return "the sources of the CUDA kernels are not here"
    return None if shutil.which(COMPILER) else f"no C++ compiler ({COMPILER}) to emulate CUDA with"


def compiled() -> Path:
    """The module for these sources, in build/."""
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    headers = b"".join(path.read_bytes() for path in sorted(HEADERS))

    def digest(*content: bytes) -> str:
        return hashlib.sha256(b"".join([repr((COMPILER, FLAGS)).encode(), headers, *content])).hexdigest()[:16]

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of pytest
        objects = {source: folder / f"{source.stem}-{digest(source.read_bytes())}.o" for source in SOURCES}
        module = folder / digest(*(path.name.encode() for path in objects.values())) / "_C.so"
        if not module.exists():
            runs = {}
            for source, path in objects.items():
                if not path.exists():
                    flags = BINDINGS_FLAGS if source.name == "bindings.cpp" else []
                    command = [COMPILER, *FLAGS, *flags, "-x", "c++", "-c", source, "-o", path.with_suffix(".part")]
                    runs[path] = subprocess.Popen(command)
            if any([run.wait() for run in runs.values()]):
                raise RuntimeError("csrc/cuda does not compile for the CPU; what the compiler said stands above")
            for path in runs:
                path.with_suffix(".part").rename(path)
            module.parent.mkdir(exist_ok=True)
            subprocess.run([COMPILER, "-shared", *objects.values(), "-o", module.with_suffix(".part")], check=True)
            module.with_suffix(".part").rename(module)
    return module


@functools.cache
def tried() -> Path | Exception:
    """What does not compile is not compiled again for every test."""
    try:
        return compiled()
    except (RuntimeError, subprocess.CalledProcessError) as error:
        return error


class Emulated(Cuda):
    """The launchers of csrc/cuda on CPU memory. One ticket for all launches: each must leave it at 0."""

    _ticket = torch.zeros((), dtype=torch.int32)

    def why_not(self, device: torch.device) -> str | None:
        return None

    def stream(self) -> int:
        return 0

    def scratch(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def ticket(self) -> torch.Tensor:
        return self._ticket


@functools.cache
def engine() -> Emulated:
    return Emulated(module(), None)


def launches() -> int:
    """How many kernels have been launched so far."""
    return ctypes.c_uint.in_dll(ctypes.CDLL(module().__file__), "emulated_launches").value


@functools.cache
def module() -> ModuleType:
    path = tried()
    if isinstance(path, Exception):
        raise path
    spec = importlib.util.spec_from_file_location("rlhf_fast_emulated._C", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
