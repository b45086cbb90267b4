"""Who may import whom: data flows cli -> recipes -> (rollout, models, rewards, data, monitor) -> ops -> kernels, csrc.
The bench stands beside them: it uses what users use, and the cli alone knows it.

The rules are read from the sources (imports at any depth, lazy ones too), and are themselves tried on small sources
that break each of them.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "rlhf_fast"
NATIVE = {"_native", "_C"}  # the compiled module
NATIVE_IMPORTER = "rlhf_fast/ops/_native.py"
LINKED = {"kernels", "bench"}  # folders of the root that the package holds links to
WORKERS = {"rollout", "models", "rewards", "data", "monitor"}
# What a folder may import of rlhf_fast beside itself. text, errors and config have nothing of the package below them.
ALLOWED: dict[str, set[str]] = {
    "text": set(),
    "errors": set(),
    "signals": {"text"},
    "metrics": set(),
    "files": {"errors"},
    "hub": {"errors"},
    "config": {"errors", "text", "metrics"},
    "checkpoint": {"errors", "text"},
    "kernels": set(),
    "ops": {"kernels"},
    "integrations": {"ops"},
    "data": {"errors", "text", "config", "hub", "ops"},
    "models": {"errors", "text", "config", "hub", "ops", "data"},
    "rewards": {"errors", "text", "config", "ops", "data", "models"},
    "rollout": {"errors", "text", "config", "ops", "data", "models", "rewards"},
    "monitor": {"errors", "text", "config", "files", "metrics"},
    "bench": {"errors", "ops"},
}
ALLOWED["recipes"] = {*WORKERS, "ops", "errors", "text", "signals", "checkpoint"}
ALLOWED["recipes"] |= {"config", "config_load", "config_yaml", "files", "metrics"}


def imports(source: str, path: str) -> Iterator[tuple[str, str | None]]:
    """Every import of ``source`` as (module, name), name None for ``import module``. ``path`` resolves relative ones;
    ``importlib.import_module("...")`` counts too."""
    folders = path.removesuffix(".py").split("/")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) - node.level] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, None


def violations(source: str, path: str) -> list[str]:
    """What a Python file, by its path from the repository's root, imports against the rules."""
    found = []
    parts = path.split("/")
    place = parts[0] if parts[0] in LINKED else parts[1].removesuffix(".py")
    for module, name in imports(source, path):
        what = f"{path} imports {module}" + (f".{name}" if name else "")
        words = module.split(".") + ([name] if name else [])
        if words[0] in ("tests", "bench"):
            found.append(f"{what}: the package never imports {words[0]}")
        if words[0] != PACKAGE or len(words) == 1:
            continue
        other = words[1]
        if place == "bench" and (module == PACKAGE or other == "ops"):
            if module not in (PACKAGE, f"{PACKAGE}.ops") or name not in PUBLIC:
                found.append(f"{what}: bench uses the public names of {PACKAGE} alone")
        elif other == "bench" and place not in ("bench", "cli"):
            found.append(f"{what}: only cli imports bench")
        elif NATIVE & set(words[1:2]) and path != NATIVE_IMPORTER:
            found.append(f"{what}: only {NATIVE_IMPORTER} imports the compiled module")
        elif other == place or other in NATIVE:
            continue
        elif place in ALLOWED and other not in ALLOWED[place]:
            found.append(f"{what}: {place} may import {', '.join(sorted(ALLOWED[place])) or 'nothing'} of {PACKAGE}")
        elif place in WORKERS and other in WORKERS | {"ops"} and (name is None or module != f"{PACKAGE}.{other}"):
            found.append(f"{what}: write `from {PACKAGE}.{other} import NAME`, its public names alone")
    return found


def public_names(folder: Path) -> set[str] | None:
    """A package's ``__all__``, or None where it has none."""
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return set(ast.literal_eval(node.value))
    return None


PUBLIC = public_names(ROOT / PACKAGE / "ops") or set()


def native_violations(source: str, path: str) -> list[str]:
    """What a C++ or CUDA file includes against the rules: no torch anywhere, Python in bindings.cpp alone."""
    found = []
    for header in re.findall(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', source, re.MULTILINE):
        first = header.split("/")[0]
        if first in ("torch", "ATen", "c10", "caffe2"):
            found.append(f"{path} includes {header}: the native module does not link torch")
        if (first in ("pybind11", "Python.h") or header.endswith("/Python.h")) and Path(path).name != "bindings.cpp":
            found.append(f"{path} includes {header}: only bindings.cpp includes Python")
    return found


def sources(folder: str, *endings: str) -> list[str]:
    files = (ROOT / folder).rglob("*")
    return sorted(str(path.relative_to(ROOT)) for path in files if path.suffix in endings and path.is_file())


# ---- the sources ---------------------------------------------------------------------------------------------------


def test_every_import_keeps_the_rules() -> None:
    files = [path for folder in (PACKAGE, *sorted(LINKED)) for path in sources(folder, ".py")]
    assert (
        "bench/harness.py" in files
        and len(files) > 40
        and NATIVE_IMPORTER.removesuffix("_native.py") + "_dispatch.py" in files
    )
    assert [line for path in files for line in violations((ROOT / path).read_text(), path)] == []


def test_what_workers_import_of_each_other_is_public() -> None:
    found = []
    for path in sources(PACKAGE, ".py"):
        place = path.split("/")[1]
        for module, name in imports((ROOT / path).read_text(), path):
            other = module.removeprefix(f"{PACKAGE}.")
            if (
                place in WORKERS
                and other in WORKERS - {place}
                and name not in (public_names(ROOT / PACKAGE / other) or ())
            ):
                found.append(f"{path} imports {name}, which is not in __all__ of {module}")
    assert found == []


def test_every_folder_of_the_package_has_a_rule() -> None:
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders - {"__pycache__"} <= ALLOWED.keys()


def test_native_sources_keep_torch_out_and_python_in_one_file() -> None:
    files = sources("csrc", ".h", ".hpp", ".cpp", ".cu", ".cuh")
    assert [line for path in files for line in native_violations((ROOT / path).read_text(), path)] == []


def test_kernels_is_no_package() -> None:
    """With an __init__.py, a folder named kernels on the path hides the Hugging Face package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


# ---- the checker ---------------------------------------------------------------------------------------------------

BROKEN = [
    ("rlhf_fast/ops/gae.py", "from rlhf_fast.models import SharedBase", "ops may import kernels"),
    ("rlhf_fast/ops/gae.py", "from rlhf_fast.errors import UserError", "ops may import kernels"),
    ("rlhf_fast/ops/gae.py", "import rlhf_fast.recipes.ppo", "ops may import kernels"),
    ("rlhf_fast/ops/gae.py", "from ..config import StageConfig", "ops may import kernels"),
    ("rlhf_fast/ops/gae.py", "from rlhf_fast import checkpoint", "ops may import kernels"),
    ("kernels/gae.py", "from rlhf_fast.ops import gae", "kernels may import nothing"),
    ("rlhf_fast/kernels/gae.py", "import rlhf_fast.ops", "kernels may import nothing"),
    ("rlhf_fast/models/shared.py", "from rlhf_fast.recipes.stage import Stage", "models may import"),
    ("rlhf_fast/data/load.py", "from rlhf_fast.cli import main", "data may import"),
    ("rlhf_fast/data/load.py", "from rlhf_fast.models import SharedBase", "data may import"),
    ("rlhf_fast/monitor/log.py", "from rlhf_fast.data import PromptRow", "monitor may import"),
    ("rlhf_fast/rewards/shaping.py", "from rlhf_fast.rollout import Response", "rewards may import"),
    ("rlhf_fast/rollout/local.py", "from rlhf_fast.models.shared import SharedBase", "public names alone"),
    ("rlhf_fast/rollout/local.py", "import rlhf_fast.models.shared", "public names alone"),
    ("rlhf_fast/rollout/local.py", "from rlhf_fast import models", "public names alone"),
    ("rlhf_fast/rollout/local.py", "import rlhf_fast.models", "public names alone"),
    ("rlhf_fast/rollout/local.py", "from ..models.shared import SharedBase", "public names alone"),
    ("rlhf_fast/rollout/local.py", "from rlhf_fast.ops.gae import gae", "public names alone"),
    ("rlhf_fast/recipes/ppo.py", "from rlhf_fast.cli import main", "recipes may import"),
    ("rlhf_fast/integrations/trl.py", "from rlhf_fast.models import SharedBase", "integrations may import ops"),
    ("rlhf_fast/integrations/trl.py", "from rlhf_fast.errors import UserError", "integrations may import ops"),
    ("rlhf_fast/checkpoint.py", "from rlhf_fast.models import SharedBase", "checkpoint may import errors"),
    ("rlhf_fast/cli.py", "from tests.ops import op_table", "never imports tests"),
    ("rlhf_fast/ops/gae.py", "import bench.bench_gae", "never imports bench"),
    ("bench/bench_gae.py", "import bench.workload", "never imports bench"),
    ("bench/bench_gae.py", "from tests.ops import op_table", "never imports tests"),
    ("bench/bench_gae.py", "from rlhf_fast import _dispatch", "public names of rlhf_fast alone"),
    ("bench/bench_gae.py", "from rlhf_fast.ops import _native", "public names of rlhf_fast alone"),
    ("bench/bench_gae.py", "from rlhf_fast.ops.gae import gae", "public names of rlhf_fast alone"),
    ("rlhf_fast/bench/bench_gae.py", "import rlhf_fast.ops.gae", "public names of rlhf_fast alone"),
    ("bench/bench_gae.py", "from rlhf_fast.models import SharedBase", "bench may import errors, ops"),
    ("rlhf_fast/config_load.py", "from rlhf_fast.bench import harness", "only cli imports bench"),
    ("rlhf_fast/ops/gae.py", "from rlhf_fast.bench.workload import Mark", "only cli imports bench"),
    ("rlhf_fast/recipes/ppo.py", "from rlhf_fast import bench", "only cli imports bench"),
    ("rlhf_fast/ops/gae.py", "from rlhf_fast import _native", "only rlhf_fast/ops/_native.py"),
    ("rlhf_fast/ops/gae.py", "import rlhf_fast._C", "only rlhf_fast/ops/_native.py"),
    ("rlhf_fast/cli.py", "from rlhf_fast._native import build_info", "only rlhf_fast/ops/_native.py"),
]
WRAPPERS = [
    "{}",
    "def f():\n    {}",
    "class A:\n    def f(self):\n        if True:\n            {}",
    "try:\n    {}\nexcept ImportError:\n    pass",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}",
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(("path", "line", "expected"), BROKEN)
def test_the_checker_finds_each_broken_rule_at_any_depth(path: str, line: str, expected: str, wrapper: str) -> None:
    (found,) = violations(wrapper.format(line), path)
    assert expected in found and path in found


@pytest.mark.parametrize("call", ["importlib.import_module", "import_module", "__import__"])
def test_the_checker_finds_imports_by_name(call: str) -> None:
    (found,) = violations(f"import importlib\ndef f():\n    {call}('rlhf_fast.models')", "rlhf_fast/ops/gae.py")
    assert "ops may import kernels" in found


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("rlhf_fast/ops/gae.py", "import torch\nfrom rlhf_fast.ops._dispatch import dispatched\nfrom . import _checks"),
        ("rlhf_fast/ops/gae.py", "def f():\n    from rlhf_fast.kernels.gae import launch"),
        ("rlhf_fast/ops/_native.py", "from rlhf_fast import _native\nimport rlhf_fast._C"),
        ("kernels/gae.py", "import triton\nimport triton.language as tl"),
        ("rlhf_fast/models/shared.py", "from rlhf_fast.models import layers\nfrom rlhf_fast.config import StageConfig"),
        ("rlhf_fast/models/shared.py", "from rlhf_fast.models.heads import ScoreHead\nfrom .layers import decoder"),
        ("rlhf_fast/rollout/local.py", "from rlhf_fast.data import PromptRow\nfrom rlhf_fast.models import SharedBase"),
        (
            "rlhf_fast/recipes/ppo.py",
            "from rlhf_fast.models import adapters\nfrom rlhf_fast.recipes.stage import Stage",
        ),
        ("rlhf_fast/recipes/ppo.py", "from rlhf_fast.rewards.shaping import token_rewards"),
        ("rlhf_fast/integrations/trl.py", "from rlhf_fast.ops import gae\nfrom rlhf_fast.ops.gae import gae"),
        ("bench/bench_gae.py", "import trl\nfrom rlhf_fast import gae, backends\nfrom rlhf_fast.ops import exact_kl"),
        ("bench/command.py", "from rlhf_fast.errors import UserError\nfrom rlhf_fast.bench.workload import Mark"),
        ("rlhf_fast/cli.py", "def f():\n    from rlhf_fast.bench.command import bench"),
        (
            "rlhf_fast/cli.py",
            "from rlhf_fast.recipes import ppo\nfrom rlhf_fast.config import STAGES\nimport testsuite",
        ),
    ],
)
def test_the_checker_lets_the_rest_pass(path: str, line: str) -> None:
    assert violations(line, path) == []


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
def test_the_checker_reads_includes(path: str, line: str, broken: bool) -> None:
    assert bool(native_violations(line, path)) is broken
