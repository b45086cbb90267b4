"""How near a kernel can come to the speed of a copy, computed from its path through its machine code (sass.py).

A prediction: no GPU takes part. For each kernel the shortest of these limits counts, as a share of a copy:

    flight   the bytes that a multiprocessor has under way, against those that hide the latency of memory
    issue    4 instructions of a warp a clock
    alu      the integer and comparison pipe takes a warp of its instructions in 2 clocks
    special  exponentials and reciprocals take a warp in 8 clocks
"""

from typing import NamedTuple

WARP = 32
REGISTERS, MOST_THREADS, MOST_BLOCKS = 65536, 2048, 32  # of a multiprocessor
LATENCY = 700e-9  # seconds of a load under load, assumed for all
COPY = 0.9  # share of the data sheet's bandwidth that a copy reaches, assumed for all


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
HEAD = "\n".join(
    (
        "| kernel | bytes a thread | in flight | instructions | " + " | ".join(gpu.name for gpu in GPUS) + " |",
        "|---|---|---|---|" + "---|" * len(GPUS),
    )
)

Report = dict[str, int]  # the fields of a sass.Path, and threads, registers and bytes of shared memory of a block


def limits(report: Report, gpu: Gpu) -> dict[str, float]:
    """Each limit as a share of a copy's speed; above 1 it does not bind."""
    copy = COPY * gpu.bandwidth / gpu.multiprocessors  # bytes a second of a multiprocessor
    moved, threads = report["loaded"] + report["stored"], report["threads"]
    registers = -(-report["registers"] // 8) * 8
    blocks = min(
        REGISTERS // (registers * threads),
        MOST_THREADS // threads,
        MOST_BLOCKS,
        gpu.shared // (report["shared"] + 1024),
    )
    # loads alone are waited for, so the bytes under way stand for the bytes moved in the share that loads have of them
    under_way = blocks * threads * report["flight"] * moved / report["loaded"]
    warp = WARP * moved * gpu.clock  # bytes of a warp, times clocks a second
    return {
        "flight": under_way / LATENCY / copy,
        "issue": warp * 4 / report["instructions"] / copy,
        "alu": warp * 4 / (2 * report["alu"]) / copy,
        "special": warp * 4 / (8 * report["special"]) / copy if report["special"] else float("inf"),
    }


def share(report: Report, gpu: Gpu) -> tuple[float, str]:
    """The narrowest limit, and its name."""
    return min((value, name) for name, value in limits(report, gpu).items())


def bytes_moved(report: Report) -> str:
    """The cell of what is loaded and stored."""
    return f"{report['loaded']} + {report['stored']}" if report["stored"] else str(report["loaded"])


def row(name: str, of_architecture: dict[str, Report]) -> str:
    """A row of a table under HEAD."""
    report = of_architecture["90"]
    cells = [name, bytes_moved(report), str(report["flight"]), str(report["instructions"])]
    for gpu in GPUS:
        value, limit = share(of_architecture[gpu.architecture], gpu)
        cells.append(f"{value:.0%}, {limit}" if value < 1 else f"100% ({value:.1f}x, {limit})")
    return f"| {' | '.join(cells)} |"
