"""The README's figures come from the committed results, and what it names is there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

import rlhf_fast.ops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
# a table of what `make gpu` wrote is the README's choice
TABLES = [path for path in RESULTS if path.stem[:4] != "gpu-" or f"<!-- results {path.stem} -->" in README]

spec = importlib.util.spec_from_file_location("bench_results", ROOT / "bench" / "results.py")
assert spec is not None and spec.loader is not None
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)


def test_every_table_has_its_results_file():
    assert {path.stem for path in TABLES} == set(re.findall(r"<!-- results ([\w-]+) -->", README))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_table_is_what_the_results_file_gives(path):
    assert results.renew(README, path.stem, json.loads(path.read_text())) == README


def test_every_operation_is_named():
    functions = {name for name in rlhf_fast.ops.__all__ if name.islower()} - {"backends", "build_info", "use_backend"}
    assert {name for name in functions if f"`{name}`" not in README} == set()


def test_every_folder_and_file_of_the_tree_exists():
    tree = README.split("## The tree")[1].split("```")[1]
    folder, missing = ROOT, []
    for line in tree.splitlines():
        names = re.findall(r"[\w.]+\.(?:py|yaml)\b|\b\w+/", line)
        if not line.startswith(" "):
            folder = ROOT
        for name in names:
            candidates = [folder / name, ROOT / "rlhf_fast" / name, ROOT / name]
            if line.startswith("  "):
                candidates += list((ROOT / "rlhf_fast").glob(f"*/{name}"))
            if not any(path.exists() for path in candidates) and not list(ROOT.glob(f"*/{name}")):
                missing.append(name)
    assert missing == []
