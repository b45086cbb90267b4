"""What `import rlhf_fast` gives: the public names of the operations, types for checkers, and a fast start."""

import subprocess
import sys
import tomllib
from pathlib import Path

import rlhf_fast
import rlhf_fast.ops

ROOT = Path(__file__).parent.parent


def test_a_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from rlhf_fast import *", names)
    assert names.keys() - {"__builtins__"} == set(rlhf_fast.ops.__all__)
    assert names["gae"] is rlhf_fast.ops.gae and set(rlhf_fast.ops.__all__) <= set(dir(rlhf_fast))


def test_the_import_alone_does_not_load_torch() -> None:
    code = "import sys, rlhf_fast; rlhf_fast.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_type_checkers_find_the_annotations() -> None:
    assert (Path(rlhf_fast.__file__).parent / "py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert "py.typed" in settings["setuptools"]["package-data"]["rlhf_fast"]
