"""The skeleton of `make new-op` is an operation that works, on every engine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from new_op import EDITS, FILES, named, write, wrong

ROOT = Path(__file__).parents[2]
NAME = "bounded_reward"
COMPILER = os.environ.get("CXX") or "c++"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this one, with the new op. It has no compiled module, since that would lack the op."""
    copy = tmp_path_factory.mktemp("new_op") / "checkout"
    leave_out = shutil.ignore_patterns("_C.*", "__pycache__")
    for folder in ("rlhf_fast", "kernels", "bench", "csrc", "docs", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=leave_out)
    for file in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, copy)
    write(NAME, copy)
    return copy


def test_it_is_formatted(checkout: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=checkout, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_it_passes_its_tests_and_the_edge_contract_on_torch_and_triton(checkout: Path) -> None:
    files = [f"tests/ops/test_{NAME}.py", "tests/ops/test_edge_contract.py", "tests/bench/test_workloads.py"]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", f"{NAME} and not native and not cuda"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


PROGRAM = """
#include "FILE"
#include <cstdio>
using namespace rlhf_fast;
int main() {
  alignas(16) const float x[] = {1, -2, 3}, grad_y[] = {1, 10, 100};
  const uint8_t live[] = {1, 0, 1};
  float y[3], grad[3];
  CALLS
  for (float number : y) printf("%g ", number);
  for (float number : grad) printf("%g ", number);
}
"""
CALLS = {
    "cpu": "portable::OP({3, x, live, 2, y}, 1); portable::OP_backward({3, x, live, 2, grad_y, grad}, 1);",
    "cuda": """Scratch none{};
  cuda::OP({3, x, live, 2, y}, none, nullptr);
  cuda::OP_backward({3, x, live, 2, grad_y, grad}, none, nullptr);""",
}


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER})")
@pytest.mark.parametrize("engine", CALLS)
def test_its_launchers_compile_and_run(checkout: Path, engine: str, tmp_path: Path) -> None:
    """On their own, since the whole engine takes a minute; CUDA's on the emulator of tests/cuda."""
    (file,) = (checkout / "csrc" / engine).glob(f"{NAME}.*")
    source, emulated = tmp_path / "main.cpp", checkout / "tests" / "cuda" / "emulated"
    source.write_text(PROGRAM.replace("CALLS", CALLS[engine]).replace("OP", NAME).replace("FILE", str(file)))
    flags = ["-std=c++17", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-DRLHF_FAST_PATH=portable", f"-I{emulated}"]
    sources = [source, *([emulated / "emulator.cpp"] if engine == "cuda" else [])]
    subprocess.run([COMPILER, *flags, *sources, "-o", tmp_path / "main"], check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    assert [float(number) for number in done.stdout.split()] == [2, 0, 6, 2, 0, 200]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "expected lower-case words joined by underscores"),
        ("BoundedReward", "expected lower-case words joined by underscores.*'BoundedReward'"),
        ("../gae", "expected lower-case words"),
        ("lambda", "expected lower-case words"),
        ("gae", "rlhf_fast/ops/gae.py, tests/ops/test_gae.py, .* is there already"),
    ],
)
def test_a_bad_name_is_refused(name: str, reason: str) -> None:
    assert re.match(reason, wrong(name, ROOT) or "")
    assert wrong(NAME, ROOT) is None


def test_the_recipe_names_what_is_to_be_edited() -> None:
    """At most twelve files by hand, of those that the script writes or changes."""
    recipe = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding an op\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\S+)` \|", recipe, re.MULTILINE)
    written = {*FILES.values(), *(path for path, _, _ in EDITS)}
    assert len(listed) <= 12 and {path.replace("<op>", "sample_op") for path in listed} < written
    page = (ROOT / "docs" / "adding-an-operation.md").read_text()
    assert [path for path in map(lambda path: named(path, NAME), written) if path not in page] == []
