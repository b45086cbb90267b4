"""docs/roofline.md: how near each CUDA kernel can come to the speed of a copy, computed from its machine code.

    python tests/cuda/roofline.py    -> its tables of CUDA kernels and of launches anew (needs nvcc)

tests/kernels/compile_ahead.py --roofline makes that of the Triton kernels.
"""

import re
import sys
from pathlib import Path

import launches
from compiled import Report, Reports, compile_all

sys.path.append(str(Path(__file__).parents[1] / "machine_code"))
from limits import GPUS, HEAD, row
from roofline_page import renew

THREADS = 256  # of a block, in every kernel here
# Kernels whose stores are one result a block; their bytes are those that they load.
REDUCES = ("walk_", "sum_", "measure", "find_statistics")
# Kernels of a row or a block, or of few rows, whose time is that of a launch.
LEFT_OUT = (
    "finish_rows", "sum_segments", "add_segments", "add_parts", "without_sequences", "measure_sequences",
    "count_tokens",
)  # fmt: skip
# With a softcap the kernels have its tanh, and are bound by it.
CAPPED = re.compile(r"walk_rows<\w+, \w+, \w+, true|write_segments<\w+, \w+, \w+, true|sum_terms<\w+, true")


def table(reports: dict[str, Reports]) -> str:
    """``reports``: of each architecture of GPUS."""
    lines, shown = [HEAD], set()
    for kernel in sorted(reports["90"]):
        operation, name = kernel.split(".", 1)
        if name.startswith(LEFT_OUT) or name.endswith("one_tile") or re.search(r"\bFloat16", name):
            continue
        if CAPPED.match(name) or name in shown:  # walk_rows is one kernel of several operations
            continue
        shown.add(name)
        of_architecture = {architecture: counted(name, of[kernel]) for architecture, of in reports.items()}
        lines.append(row(f"`{operation}`, `{name}`", of_architecture))
    return "\n".join(lines)


def counted(name: str, report: Report) -> Report:
    """The report with the bytes that come from and go to memory."""
    if name.startswith("turn"):  # the angles of a token are the same for all heads: from memory come the heads alone
        report = {**report, "loaded": report["stored"], "flight": report["stored"]}
    if name.startswith(REDUCES):
        report = {**report, "stored": 0}
    return {**report, "threads": THREADS}


if __name__ == "__main__":
    compiled = {architecture: compile_all(architecture) for architecture in {gpu.architecture for gpu in GPUS}}
    renew("roofline", table(compiled))
    renew("launches", launches.table())
