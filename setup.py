"""Compiles the native engine, rlhf_fast._C, with CMake. All else about the package stands in pyproject.toml.

Environment variables of an install:

    RLHF_FAST_NATIVE=0            leaves the engine out: the ops run on their torch references
    RLHF_FAST_CUDA=1, =0          without nvcc stops, builds for the CPU alone; unset: CUDA where nvcc is found
    RLHF_FAST_CUDA_ARCHS=80,90    the GPUs to compile for, as nvcc numbers them
    RLHF_FAST_SANITIZE=address    what the compiler's -fsanitize= takes, for `make sanitize`
    CUDA_HOME, CUDA_PATH, CXX     where nvcc lies, and the C++ compiler
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULE = "rlhf_fast._C"
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")  # A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50
WITHOUT_CUDA = "RLHF_FAST_CUDA=0 pip install .      compiles for the CPU alone"
WITHOUT_ENGINE = "RLHF_FAST_NATIVE=0 pip install .    leaves the engine out: the ops run on their torch references"


def switch(variable: str) -> bool | None:
    """An environment variable that is 1, 0 or not there."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"rlhf-fast: expected {variable}=0 or {variable}=1; got {value!r}")
    return None if value == "" else value == "1"


def find_compiler() -> str:
    """The C++ compiler that CMake will take."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise SystemExit(cannot_build(f"no C++ compiler ({', '.join(names)})", "g++", "gcc-c++"))
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise SystemExit(cannot_build(f"no Python.h in {headers}", "python3-dev", "python3-devel"))
    return compiler


def pybind11_headers() -> Path:
    """The include folder of pybind11, or of torch, which brings its headers, where there is no pybind11."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or ():
            headers = Path(folder) / "include"
            if (headers / "pybind11" / "pybind11.h").exists():
                return headers
    raise SystemExit(
        "rlhf-fast: no pybind11, nor a torch with its headers; leave out --no-build-isolation, or install it"
    )


def cannot_build(what: str, debian: str, fedora: str) -> str:
    return f"""
rlhf-fast cannot compile its engine: there is {what}. Install it and try again:
    Debian, Ubuntu    apt install {debian}
    Fedora            dnf install {fedora}
    macOS             xcode-select --install
Or do without:
    {WITHOUT_ENGINE}"""


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, CUDA_PATH or PATH; None where there is none or none is wanted."""
    wanted = switch("RLHF_FAST_CUDA")
    if wanted is False:
        return None
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if nvcc is None and wanted:
        raise SystemExit("rlhf-fast: RLHF_FAST_CUDA=1, and no nvcc in CUDA_HOME, CUDA_PATH or PATH")
    return nvcc


def cuda_architectures(nvcc: str) -> list[str]:
    """RLHF_FAST_CUDA_ARCHS, or those of ours that this nvcc knows; oldest first."""
    try:
        listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"rlhf-fast: nvcc cannot run: {error}\n    {WITHOUT_CUDA}") from error
    known = re.findall(r"compute_(\d+)", listing)
    wanted = re.findall(r"[^;,\s]+", os.environ.get("RLHF_FAST_CUDA_ARCHS", ""))
    chosen = wanted or [name for name in CUDA_ARCHITECTURES if name in known]
    unknown = [name for name in chosen if re.sub("[af]$", "", name) not in known]
    if unknown or not chosen:
        raise SystemExit(
            f"rlhf-fast: RLHF_FAST_CUDA_ARCHS: {nvcc} cannot compile for {', '.join(unknown or CUDA_ARCHITECTURES)}; "
            f"expected numbers such as 80,90 out of {', '.join(known)}"
        )
    return sorted(chosen, key=lambda name: int(re.sub(r"\D", "", name)))


def cmake_settings() -> dict[str, str]:
    """What the build depends on; says in one line whether CUDA is part of it."""
    settings = {"CMAKE_BUILD_TYPE": "Release", "RLHF_FAST_SANITIZE": os.environ.get("RLHF_FAST_SANITIZE", "")}
    nvcc = find_nvcc()
    if nvcc is None:
        why = "no nvcc in CUDA_HOME, CUDA_PATH or PATH" if switch("RLHF_FAST_CUDA") is None else "RLHF_FAST_CUDA=0"
        print(f"rlhf-fast: compiling for the CPU alone: {why}", flush=True)
        return {**settings, "RLHF_FAST_CUDA": "OFF"}
    architectures = cuda_architectures(nvcc)
    print(f"rlhf-fast: compiling for the CPU and, with {nvcc}, for CUDA {', '.join(architectures)}", flush=True)
    # The newest also as PTX, which the driver compiles for GPUs to come.
    code = [*(f"{name}-real" for name in architectures), f"{architectures[-1]}-virtual"]
    return {
        **settings,
        "RLHF_FAST_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_ARCHITECTURES": ";".join(code),
    }


def compile_engine() -> Path:
    """Runs CMake; returns the compiled module."""
    compiler, settings, headers = find_compiler(), cmake_settings(), pybind11_headers()
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None:
        raise SystemExit("rlhf-fast: no cmake or no ninja in PATH; leave out --no-build-isolation, or install both")
    # A CMake folder stays with the compilers and flags it began with, so each choice of them has its own. It outlives
    # pip's build environment: where that lies is told anew each time.
    flags = [os.environ.get(name) for name in ("CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")]
    choice = hashlib.sha256(repr((ROOT, compiler, os.environ.get("CXX"), flags, settings)).encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-{choice}"
    environment = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "PYBIND11_HEADERS": str(headers),
    }
    definitions = [f"-D{name}={value}" for name, value in {**settings, **environment}.items()]
    try:
        subprocess.run([cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions], check=True)
        subprocess.run([cmake, "--build", folder], check=True)
    except subprocess.CalledProcessError as error:
        choices = [WITHOUT_CUDA, WITHOUT_ENGINE] if settings["RLHF_FAST_CUDA"] == "ON" else [WITHOUT_ENGINE]
        raise SystemExit(
            "\n    ".join(["\nrlhf-fast: the engine does not compile; what CMake said stands above.", *choices])
        ) from error
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


class BuildEngine(build_ext):
    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(compile_engine()), str(target))


def main() -> None:
    native = switch("RLHF_FAST_NATIVE") is not False
    if not native and "editable_wheel" in sys.argv:
        for earlier in (ROOT / "rlhf_fast").glob("_C.*"):  # an editable install would go on using it
            earlier.unlink()
    packages = {*find_namespace_packages(include=["rlhf_fast*"]), "rlhf_fast.kernels", "rlhf_fast.bench"}
    setup(
        packages=sorted(packages),
        ext_modules=[Extension(MODULE, sources=[])] * native,
        cmdclass={"build_ext": BuildEngine},
    )


if __name__ == "__main__":
    main()
