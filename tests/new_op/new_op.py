"""`make new-op NAME=my_op`: a new operation on torch, the CPU, CUDA and Triton that works as written.

It computes y = x * scale of each token that counts, with its gradient. skeleton/ has its files, EDITS the lines that it
adds to others. Change the formulas, then what surrounds them: docs/adding-an-operation.md.
"""

import importlib.util
import keyword
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKELETON = Path(__file__).parent / "skeleton"

FILES = {
    "op.py": "rlhf_fast/ops/sample_op.py",
    "cases.py": "tests/ops/test_sample_op.py",
    "cpu.cpp": "csrc/cpu/sample_op.cpp",
    "cuda.cu": "csrc/cuda/sample_op.cu",
    "kernel.py": "kernels/sample_op.py",
    "bench.py": "bench/bench_sample_op.py",
}
# File, the text that it has once, and what is inserted before that.
EDITS = [
    ("rlhf_fast/ops/__init__.py", "\n__all__ = [", "from .sample_op import sample_op\n"),
    ("rlhf_fast/ops/__init__.py", '    "use_backend",', '    "sample_op",\n'),
    (
        "tests/ops/op_table.py",
        "\n]\n\n\n# ---- layers:",
        """
    Op(
        "sample_op",
        lambda x, targets, mask: (ops.sample_op(x["x"], mask, scale=2.0),),
        lambda x, targets, mask: (_masked(x["x"] * 2.0, mask),),
        {"x": ()},
        ("x",),
        row_wise=True,
    ),""",
    ),
    (
        "kernels/records.py",
        "\n\nRecord = (\n",
        """

class SampleOp(NamedTuple):
    tokens: Size
    x: In
    live: Live | None
    scale: Number
    y: Out


class SampleOpBackward(NamedTuple):
    tokens: Size
    x: In
    live: Live | None
    scale: Number
    grad_y: In
    grad: Out
""",
    ),
    ("kernels/records.py", "\n)\n# A launcher has the same name", "\n    | SampleOp\n    | SampleOpBackward"),
    (
        "kernels/records.py",
        "\n}\nNAMES = ",
        '\n    "sample_op": SampleOp,\n    "sample_op_backward": SampleOpBackward,',
    ),
    (
        "csrc/formulas.h",
        "// One step of GAE, backwards in time:",
        """// sample_op of a token, and its slope by x. F{} is 0.
template <class F>
RLHF_FAST_FORMULA F sample_op_value(F x, float scale) {
  return x * scale;
}

template <class F>
RLHF_FAST_FORMULA F sample_op_slope(F x, float scale) {
  return F{} + scale;
}

""",
    ),
    ("tests/kernels/calls.py", "):\n        yield from of_op()", ", sample_op"),
    (
        "tests/kernels/calls.py",
        "def gae() -> Iterator[Call]:",
        """def sample_op() -> Iterator[Call]:
    for count, live in ((64, mask(64)), (64, None), (61, mask(61))):
        yield Call(partial(ops.sample_op, floats(count), live, scale=2.0), count == 64)


""",
    ),
    ("bench/command.py", '    "overhead",\n', '    "sample_op",\n'),
    (
        "bench/bench_overhead.py",
        '    "gae": lambda random, n:',
        '    "sample_op": lambda random, n: (leaf(random(n)),),\n',
    ),
    ("docs/operations.md", "| `pairwise_loss` |", "| `sample_op` | one sentence: what it computes |\n"),
    ("docs/api.md", "## Preferences", "## New\n\n::: rlhf_fast.sample_op\n\n"),
    ("README.md", "Preferences: `pairwise_loss`", "New: `sample_op`.\n"),
]


def named(text: str, name: str) -> str:
    """The skeleton's text for an op of this name."""
    camel = "".join(part.capitalize() for part in name.split("_"))
    return text.replace("sample_op", name).replace("SampleOp", camel)


def wrong(name: str, root: Path) -> str | None:
    """Why there can be no new op of this name."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        return f"expected lower-case words joined by underscores, such as bounded_reward; got {name!r}"
    there = [path for path in map(lambda path: named(path, name), FILES.values()) if (root / path).exists()]
    return f"{', '.join(there)} is there already" if there else None


def write(name: str, root: Path) -> list[str]:
    """Writes the op into the checkout ``root``. Returns its new files and those that it changed."""
    changed: dict[str, str] = {}
    for path, before, text in EDITS:
        content = changed.get(path) or (root / path).read_text()
        if content.count(before) != 1:
            raise SystemExit(f"new_op: expected {before!r} once in {path}; adapt EDITS in tests/new_op/new_op.py")
        changed[path] = content.replace(before, named(text, name) + before)
    changed |= {named(path, name): named((SKELETON / source).read_text(), name) for source, path in FILES.items()}
    for path, content in changed.items():
        (root / path).write_text(content)
    python = [path for path in changed if path.endswith(".py")]
    for command in (
        ["-m", "ruff", "check", "--quiet", "--fix", "--select", "I,RUF022", *python],
        ["-m", "ruff", "format", "--quiet", *python],
        ["csrc/write_records.py"],
    ):
        subprocess.run([sys.executable, *command], cwd=root, env={"PYTHONPATH": str(root)}, check=True)
    return [*changed, "csrc/records.h"]


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("new_op: expected a name: make new-op NAME=bounded_reward")
    (name,) = sys.argv[1:]
    if reason := wrong(name, ROOT):
        raise SystemExit(f"new_op: {reason}")
    if importlib.util.find_spec("ruff") is None:
        raise SystemExit("new_op: ruff is not installed; use make new-op")
    print("\n".join(write(name, ROOT)))
    print("\nIt computes x * scale; docs/adding-an-operation.md says how to go on")


if __name__ == "__main__":
    main()
