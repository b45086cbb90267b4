"""Decisions of setup.py, its errors, and the effect of a missing or damaged compiled module."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MODULE = ROOT / "rlhf_fast" / f"_C{SUFFIX}"
LISTING = "echo compute_75; echo compute_80; echo compute_90; echo compute_100"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, with no environment settings and nothing but ``tmp_path/bin`` on PATH."""
    for name in ("RLHF_FAST_NATIVE", "RLHF_FAST_CUDA", "RLHF_FAST_CUDA_ARCHS", "CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path: Path, script: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


# ---- compilers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_any_compiler_on_path_will_do(setup: ModuleType, tmp_path: Path, name: str) -> None:
    compiler = program(tmp_path / "bin" / name)
    assert setup.find_compiler() == compiler


def test_cxx_names_the_compiler(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin" / "c++")
    mine = program(tmp_path / "mine" / "g++-12")
    monkeypatch.setenv("CXX", f"{mine} -pipe")
    assert setup.find_compiler() == mine
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler \(g\+\+-99\)"):
        setup.find_compiler()


def test_no_python_headers(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin" / "c++")
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"no Python.h in (.|\n)*apt install python3-dev"):
        setup.find_compiler()


def test_nvcc_is_looked_for_in_cuda_home_then_cuda_path_then_path(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.find_nvcc() is None
    on_path = program(tmp_path / "bin" / "nvcc")
    assert setup.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))  # a CUDA without its compiler
    assert setup.find_nvcc() == on_path
    in_path = program(tmp_path / "path" / "bin" / "nvcc")
    assert setup.find_nvcc() == in_path
    in_home = program(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup.find_nvcc() == in_home
    monkeypatch.setenv("RLHF_FAST_CUDA", "0")
    assert setup.find_nvcc() is None


def test_cuda_asked_for_and_no_nvcc(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="RLHF_FAST_CUDA=1, and no nvcc"):
        setup.find_nvcc()
    nvcc = program(tmp_path / "bin" / "nvcc")
    assert setup.find_nvcc() == nvcc


def test_a_switch_is_1_or_0(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="RLHF_FAST_CUDA=1; got 'yes'"):
        setup.find_nvcc()


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("", ["80", "90", "100"]),  # ours, as far as this nvcc knows them
        ("90", ["90"]),
        ("100;75", ["75", "100"]),
        ("80, 90a", ["80", "90a"]),
    ],
)
def test_cuda_architectures(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, chosen: list[str]
) -> None:
    nvcc = program(tmp_path / "bin" / "nvcc", LISTING)
    monkeypatch.setenv("RLHF_FAST_CUDA_ARCHS", wanted)
    assert setup.cuda_architectures(nvcc) == chosen


@pytest.mark.parametrize("wanted", ["80,120", "sm_80", "8.0", "native", "90ax"])
def test_what_nvcc_cannot_compile_for(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    nvcc = program(tmp_path / "bin" / "nvcc", LISTING)
    monkeypatch.setenv("RLHF_FAST_CUDA_ARCHS", wanted)
    with pytest.raises(SystemExit, match="RLHF_FAST_CUDA_ARCHS: .*nvcc cannot compile for .*out of 75, 80, 90, 100"):
        setup.cuda_architectures(nvcc)


def test_an_nvcc_older_than_all_our_architectures(setup: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="RLHF_FAST_CUDA_ARCHS: .*cannot compile for 80, 86"):
        setup.cuda_architectures(program(tmp_path / "bin" / "nvcc", "echo compute_70"))


def test_an_nvcc_that_does_not_run(setup: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nvcc cannot run(.|\n)*RLHF_FAST_CUDA=0"):
        setup.cuda_architectures(program(tmp_path / "bin" / "nvcc", "exit 3"))


def test_what_cmake_is_told(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.cmake_settings()["RLHF_FAST_CUDA"] == "OFF"
    assert (
        capsys.readouterr().out == "rlhf-fast: compiling for the CPU alone: no nvcc in CUDA_HOME, CUDA_PATH or PATH\n"
    )
    nvcc = program(tmp_path / "bin" / "nvcc", LISTING)
    settings = setup.cmake_settings()
    assert (settings["RLHF_FAST_CUDA"], settings["CMAKE_CUDA_COMPILER"]) == ("ON", nvcc)
    assert settings["CMAKE_CUDA_ARCHITECTURES"] == "80-real;90-real;100-real;100-virtual"
    assert f"with {nvcc}, for CUDA 80, 90, 100" in capsys.readouterr().out
    monkeypatch.setenv("RLHF_FAST_CUDA", "0")
    assert setup.cmake_settings()["RLHF_FAST_CUDA"] == "OFF"
    assert capsys.readouterr().out == "rlhf-fast: compiling for the CPU alone: RLHF_FAST_CUDA=0\n"


@pytest.mark.parametrize("cuda", [False, True])
def test_a_failing_cmake(
    setup: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cuda: bool
) -> None:
    monkeypatch.setattr(setup, "pybind11_headers", lambda: tmp_path)
    for name, script in {"c++": "", "ninja": "", "cmake": "echo 'gae.cpp:7: error: expected ;' >&2; exit 1"}.items():
        program(tmp_path / "bin" / name, script)
    if cuda:
        program(tmp_path / "bin" / "nvcc", LISTING)
    with pytest.raises(SystemExit, match="stands above(.|\n)*RLHF_FAST_NATIVE=0 pip install") as stopped:
        setup.compile_engine()
    assert ("RLHF_FAST_CUDA=0 pip install" in str(stopped.value)) is cuda
    assert "gae.cpp:7: error: expected ;" in capfd.readouterr().err


def test_pybind11_headers_are_its_own_or_those_that_torch_brings(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for package in ("pybind11", "torch"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    importlib.invalidate_caches()
    with pytest.raises(SystemExit, match="no pybind11, nor a torch with its headers"):
        setup.pybind11_headers()
    for package in ("torch", "pybind11"):  # each has precedence over the one before
        headers = tmp_path / package / "include" / "pybind11"
        headers.mkdir(parents=True)
        (headers.parents[1] / "__init__.py").touch()
        importlib.invalidate_caches()
        (headers / "pybind11.h").touch()
        assert setup.pybind11_headers() == headers.parent


# ---- builds --------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The package reduced to its version, a file of kernels/ and one of bench/, with an earlier module. Not a compiler,
    nor the links rlhf_fast/kernels and rlhf_fast/bench, which a checkout on Windows may lack.
    """
    folder = tmp_path / "project"
    for name in ("rlhf_fast", "kernels", "bench"):
        (folder / name).mkdir(parents=True)
    for name in (
        *("setup.py", "pyproject.toml", "README.md", "LICENSE", "rlhf_fast/__init__.py"),
        *("kernels/records.py", "bench/command.py"),
    ):
        shutil.copy(ROOT / name, folder / name)
    (folder / "rlhf_fast" / f"_C{SUFFIX}").touch()
    return folder


def build(project: Path, how: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``how`` is a hook of the build backend, called as pip calls it."""
    line = f"from setuptools import build_meta; build_meta.{how}('dist')"
    path = {"PATH": str(project.parent / "bin")}
    return subprocess.run(
        [sys.executable, "-c", line], cwd=project, env=path | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("how", ["build_wheel", "build_editable"])
def test_without_the_engine_nothing_is_compiled(project: Path, how: str) -> None:
    outcome = build(project, how, RLHF_FAST_NATIVE="0")
    assert outcome.returncode == 0, outcome.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name.endswith("-none-any.whl")
    if how == "build_wheel":
        files = zipfile.ZipFile(wheel).namelist()
        assert {"rlhf_fast/kernels/records.py", "rlhf_fast/bench/command.py"} <= set(files)
    # An editable install uses the checkout, where the earlier module must not be loaded any more.
    assert (project / "rlhf_fast" / f"_C{SUFFIX}").exists() is (how == "build_wheel")


@pytest.mark.parametrize("how", ["build_wheel", "build_editable"])
def test_no_compiler_ends_with_what_to_do(project: Path, how: str) -> None:
    outcome = build(project, how)
    assert outcome.returncode == 1
    assert outcome.stderr.endswith(
        """
rlhf-fast cannot compile its engine: there is no C++ compiler (c++, g++, clang++). Install it and try again:
    Debian, Ubuntu    apt install g++
    Fedora            dnf install gcc-c++
    macOS             xcode-select --install
Or do without:
    RLHF_FAST_NATIVE=0 pip install .    leaves the engine out: the ops run on their torch references
"""
    )


def test_the_module_is_what_setup_would_build_here() -> None:
    """CUDA where there is an nvcc, linked statically."""
    spec = importlib.util.spec_from_file_location("setup_here", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    here = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(here)
    import rlhf_fast

    info = rlhf_fast.build_info()
    assert info["native"] == MODULE.name
    assert (info["cuda"] is not None) == (here.find_nvcc() is not None), "run make: nvcc came or went"
    assert b"libcudart.so" not in MODULE.read_bytes()


# ---- a module that cannot be used ----------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package without its compiled module."""
    folder = tmp_path / "rlhf_fast"
    folder.mkdir()
    for path in (ROOT / "rlhf_fast").iterdir():
        if not path.name.startswith("_C"):
            (folder / path.name).symlink_to(path)
    return folder


def child(package: Path, script: str) -> Any:
    """What a fresh Python next to ``package`` prints, read as JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RLHF_FAST_")}
    outcome = subprocess.run(
        [sys.executable, "-c", script], cwd=package.parent, env=environment, capture_output=True, text=True
    )
    assert outcome.returncode == 0, f"exit status {outcome.returncode}: {outcome.stderr}"
    return json.loads(outcome.stdout)


USE = """
import json, warnings, torch, rlhf_fast
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    kl = [rlhf_fast.token_kl(torch.tensor([-1.0]), torch.tensor([-3.0])).item() for _ in range(2)]
try:
    with rlhf_fast.use_backend("native"):
        rlhf_fast.token_kl(torch.zeros(1), torch.zeros(1))
except RuntimeError as error:
    forced = str(error)
listing = rlhf_fast.backends("cpu")["token_kl"]
print(json.dumps([rlhf_fast.build_info(), listing, [str(warning.message) for warning in said], kl, forced]))
"""


def test_a_module_for_another_python_is_said_wherever_someone_may_ask(package: Path) -> None:
    (package / "_C.cpython-310-x86_64-linux-gnu.so").touch()
    info, listing, said, kl, forced = child(package, USE)
    reason = (
        f"compiled for another Python: there is _C.cpython-310-x86_64-linux-gnu.so, this one needs {MODULE.name}; "
        "install rlhf-fast again"
    )
    assert info == {"native": None, "reason": reason}
    assert (listing["chosen"], listing["unavailable"]["native"]) == ("torch", reason)
    assert said == [f"token_kl: backend 'native' cannot run here and is skipped: {reason}"]
    assert kl == [2.0, 2.0]
    assert reason in forced


def test_a_missing_or_damaged_module_is_named_and_harmless(package: Path) -> None:
    """Truncated anywhere: the loader would crash with a bus error when it maps the missing part."""
    whole = MODULE.read_bytes()
    cuts = [0, 1, 63, 64, 1000, *range(4096, len(whole), len(whole) // 20), len(whole) - 1]
    script = f"""
import importlib, json
from pathlib import Path
import rlhf_fast.ops._native as native
reasons = [native._reason]
for content in [*(Path({str(MODULE)!r}).read_bytes()[:cut] for cut in {cuts}), b"no module at all", b"\\x7fELF\\x02"]:
    Path("rlhf_fast/{MODULE.name}").write_bytes(content)
    importlib.invalidate_caches()
    reasons.append(native._load()[1])
print(json.dumps(reasons))
"""
    missing, *damaged = child(package, script)
    assert missing.startswith("not compiled: install a C++ compiler")
    assert len(damaged) == len(cuts) + 2
    for reason in damaged:
        assert reason is not None and MODULE.name in reason and reason.endswith("install rlhf-fast again")


def test_a_module_of_another_state_of_the_sources(package: Path) -> None:
    shutil.copy(MODULE, package)
    shutil.copytree(ROOT / "csrc", package.parent / "csrc")
    script = """
import json
from pathlib import Path
import rlhf_fast.ops._native as native
header = Path("csrc/rlhf_fast.h")
header.write_text(header.read_text() + "// another launcher")
print(json.dumps([native._reason, native._load()[1]]))
"""
    before, after = child(package, script)
    assert before is None
    assert after == f"the compiled module {MODULE.name} is from other sources than csrc/; run make or install it again"
