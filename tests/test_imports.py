"""Rules for imports that import-linter does not have: the public names of the operations, the compiled module, and what
C++ files include. `make lint` checks the others ([tool.importlinter] in pyproject.toml).
"""

import ast
import re
from pathlib import Path

import pytest

import rlhf_fast.ops

ROOT = Path(__file__).parents[1]
PUBLIC = {
    *rlhf_fast.ops.__all__,
    "PackedWeight",
    "can_attend",
    "short_attention",
}  # the last three: for rlhf_fast.models


def sources(*folders: str, endings: tuple[str, ...]) -> list[str]:
    files = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return sorted(str(path.relative_to(ROOT)) for path in files if path.suffix in endings)


def import_violations(source: str, path: str) -> list[str]:
    """Outside its folder, ops is its public names (an operation is also a file there, so import-linter cannot tell them
    apart). Inside, one file loads the compiled module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = f"{path} has `{ast.unparse(node)}`" if isinstance(node, ast.stmt | ast.Call) else ""
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            names = {str(node.args[0].value)}
        else:
            continue
        if "rlhf_fast._C" in names and path != "rlhf_fast/ops/_native.py":
            found.append(f"{what}: only rlhf_fast/ops/_native.py imports the compiled module")
        if path == "rlhf_fast/__init__.py" or path.startswith("rlhf_fast/ops/"):
            continue
        inside = {name.removeprefix("rlhf_fast.ops.") for name in names if name.startswith("rlhf_fast.ops.")}
        if not inside <= PUBLIC or (inside and isinstance(node, ast.Import)):
            found.append(f"{what}: write `from rlhf_fast.ops import NAME` with one of its public names")
    return found


def include_violations(source: str, path: str) -> list[str]:
    """No torch in C++ and CUDA, and Python in bindings.cpp alone."""
    found = []
    for header in re.findall(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', source, re.MULTILINE):
        first = header.split("/")[0]
        if first in ("torch", "ATen", "c10", "caffe2"):
            found.append(f"{path} includes {header}: the native module does not link torch")
        if (first in ("pybind11", "Python.h") or header.endswith("/Python.h")) and Path(path).name != "bindings.cpp":
            found.append(f"{path} includes {header}: only bindings.cpp includes Python")
    return found


def test_operations_are_imported_by_their_public_names_and_the_compiled_module_once() -> None:
    files = sources("rlhf_fast", "kernels", "bench", endings=(".py",))
    assert len(files) > 100 and "rlhf_fast/ops/_native.py" in files
    assert [line for path in files for line in import_violations((ROOT / path).read_text(), path)] == []


def test_native_sources_keep_torch_out_and_python_in_one_file() -> None:
    files = sources("csrc", endings=(".h", ".hpp", ".cpp", ".cu", ".cuh"))
    assert len(files) > 20
    assert [line for path in files for line in include_violations((ROOT / path).read_text(), path)] == []


def test_kernels_is_no_package() -> None:
    """With an __init__.py, a folder named kernels on the path hides the Hugging Face package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("path", "line", "broken"),
    [
        ("rlhf_fast/rollout/local.py", "from rlhf_fast.ops.gae import gae", True),
        ("bench/bench_gae.py", "def f():\n    import rlhf_fast.ops.gae", True),
        ("bench/bench_gae.py", "from rlhf_fast.ops import _native", True),
        ("rlhf_fast/recipes/ppo.py", "from rlhf_fast.ops import gae, exact_kl", False),
        ("rlhf_fast/ops/gae.py", "from rlhf_fast.ops._dispatch import implements", False),
        ("rlhf_fast/ops/gae.py", "import rlhf_fast._C", True),
        ("rlhf_fast/cli.py", "from rlhf_fast import _C", True),
        ("rlhf_fast/cli.py", "importlib.import_module('rlhf_fast._C')", True),
        ("rlhf_fast/ops/_native.py", "importlib.import_module('rlhf_fast._C')", False),
    ],
)
def test_broken_imports_are_found(path: str, line: str, broken: bool) -> None:
    assert bool(import_violations(line, path)) is broken


@pytest.mark.parametrize(
    ("path", "line", "broken"),
    [
        ("csrc/cpu/gae.cpp", "#include <torch/extension.h>", True),
        ("csrc/rlhf_fast.h", '  #  include "ATen/ATen.h"', True),
        ("csrc/cuda/gae.cu", "#include <c10/cuda/CUDAStream.h>", True),
        ("csrc/bindings.cpp", "#include <torch/torch.h>", True),
        ("csrc/cpu/gae.cpp", "#include <pybind11/pybind11.h>", True),
        ("csrc/rlhf_fast.h", "#include <Python.h>", True),
        ("csrc/cpu/gae.cpp", "#include <python3.11/Python.h>", True),
        ("csrc/bindings.cpp", "#include <pybind11/pybind11.h>\n#include <Python.h>", False),
        ("csrc/cpu/gae.cpp", '#include <vector>\n#include "../rlhf_fast.h"\n// no <torch/torch.h> here', False),
    ],
)
def test_broken_includes_are_found(path: str, line: str, broken: bool) -> None:
    assert bool(include_violations(line, path)) is broken
