"""docs/roofline.md: how near each CUDA kernel can come to the speed of a copy, computed from its machine code.

    python tests/cuda/roofline.py    -> the tables of docs/roofline.md anew (needs nvcc)

A prediction: no GPU takes part. For each kernel the shortest of these limits counts, as a share of a copy:

    flight   the bytes that a multiprocessor has under way, against those that hide the latency of memory
    issue    4 instructions of a warp a clock
    alu      the integer and comparison pipe takes a warp of its instructions in 2 clocks
    special  exponentials and reciprocals take a warp in 8 clocks
"""

import re
from typing import NamedTuple

import launches
from compiled import Report, Reports, compile_all

THREADS = 256  # of a block, in every kernel here
WARP = 32
REGISTERS, MOST_THREADS = 65536, 2048  # of a multiprocessor
LATENCY = 700e-9  # seconds of a load under load, assumed for all
COPY = 0.9  # share of the data sheet's bandwidth that a copy reaches, assumed for all
# Kernels whose stores are one result a block; their bytes are those that they load.
REDUCES = ("walk_", "sum_", "measure", "find_statistics")
# Kernels of a row or a block, or of few rows, whose time is that of a launch.
LEFT_OUT = (
    "finish_rows", "sum_segments", "add_segments", "add_parts", "without_sequences", "measure_sequences",
    "count_tokens",
)  # fmt: skip
# With a softcap the kernels have its tanh, and are bound by it.
CAPPED = re.compile(r"walk_rows<\w+, \w+, \w+, true|write_segments<\w+, \w+, \w+, true|sum_terms<\w+, true")


class Gpu(NamedTuple):
    name: str
    architecture: str
    multiprocessors: int
    clock: float  # hertz, the boost clock of the data sheet
    bandwidth: float  # bytes a second, of the data sheet
    shared: int  # bytes of a multiprocessor


GPUS = (
    Gpu("A100", "80", 108, 1.41e9, 2.04e12, 164 << 10),
    Gpu("H100", "90", 132, 1.98e9, 3.35e12, 228 << 10),
    Gpu("H200", "90", 132, 1.98e9, 4.8e12, 228 << 10),
    Gpu("B200", "100", 148, 1.965e9, 8.0e12, 228 << 10),
)


def limits(report: Report, gpu: Gpu, *, reduces: bool) -> dict[str, float]:
    """Each limit as a share of a copy's speed; above 1 it does not bind."""
    copy = COPY * gpu.bandwidth / gpu.multiprocessors  # bytes a second of a multiprocessor
    moved = report["loaded"] + (0 if reduces else report["stored"])
    registers = -(-report["registers"] // 8) * 8
    blocks = min(REGISTERS // (registers * THREADS), MOST_THREADS // THREADS, gpu.shared // (report["shared"] + 1024))
    # loads alone are waited for, so the bytes under way stand for the bytes moved in the share that loads have of them
    under_way = blocks * THREADS * report["flight"] * moved / report["loaded"]
    warp = WARP * moved * gpu.clock  # bytes of a warp, times clocks a second
    return {
        "flight": under_way / LATENCY / copy,
        "issue": warp * 4 / report["instructions"] / copy,
        "alu": warp * 4 / (2 * report["alu"]) / copy,
        "special": warp * 4 / (8 * report["special"]) / copy if report["special"] else float("inf"),
    }


def cell(report: Report, gpu: Gpu, *, reduces: bool) -> str:
    found = limits(report, gpu, reduces=reduces)
    binding = min(found, key=found.__getitem__)
    return f"{found[binding]:.0%}, {binding}" if found[binding] < 1 else f"100% ({found[binding]:.1f}x, {binding})"


def table(reports: dict[str, Reports]) -> str:
    """``reports``: of each architecture of GPUS."""
    lines = [
        "| kernel | bytes a thread | in flight | instructions | " + " | ".join(gpu.name for gpu in GPUS) + " |",
        "|---|---|---|---|" + "---|" * len(GPUS),
    ]
    shown = set()
    for kernel, report in sorted(reports["90"].items()):
        operation, name = kernel.split(".", 1)
        if name.startswith(LEFT_OUT) or name.endswith("one_tile") or re.search(r"\bFloat16", name):
            continue
        if CAPPED.match(name) or name in shown:  # walk_rows is one kernel of several operations
            continue
        shown.add(name)
        reduces = name.startswith(REDUCES)
        of_gpus = {gpu: reports[gpu.architecture][kernel] for gpu in GPUS}
        # the angles of a token are the same for all heads: from memory come the heads alone
        if name.startswith("turn"):
            of_gpus = {gpu: {**of, "loaded": of["stored"], "flight": of["stored"]} for gpu, of in of_gpus.items()}
            report = of_gpus[GPUS[1]]
        cells = [cell(of, gpu, reduces=reduces) for gpu, of in of_gpus.items()]
        stored = "" if reduces else f" + {report['stored']}"
        lines.append(
            f"| `{operation}`, `{name}` | {report['loaded']}{stored} | {report['flight']} | {report['instructions']} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    compiled = {architecture: compile_all(architecture) for architecture in {gpu.architecture for gpu in GPUS}}
    launches.renew("roofline", table(compiled))
    launches.renew("launches", launches.table())
