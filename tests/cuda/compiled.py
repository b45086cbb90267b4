"""What the compiler makes of every kernel of csrc/cuda, on a machine without a GPU, and what budget.json allows it.

    python tests/cuda/compiled.py 90         -> one line of JSON a kernel, compiled for that architecture
    python tests/cuda/compiled.py --renew    -> budget.json anew

    registers     at most so many a thread
    shared        at most so many bytes, besides what a launch asks for
    instructions  at most so many on the path of an aligned thread (sass.py); a loop counts once
    load, store   the widest access of global memory is at least so many bits
    flight        at least so many bytes of a thread are loaded before the first of them is used

Nothing may spill or have a stack.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "machine_code"))
import sass

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
FILE = Path(__file__).with_name("budget.json")
ARCHITECTURES = ("80", "90", "100", "120")
MOST_REGISTERS = 255
OUR_NAMESPACES = r"rlhf_fast::cuda::|\(anonymous namespace\)::"
AT_LEAST = ("load", "store", "flight")

# Kernels whose shortest path is not the usual one, for sass.path. gae reads its tokens 4 bytes at a time and the bounds
# of sequences 8, and a thread writes 8 numbers unless the sequence ends. Columns of a head that are not turned are only
# copied. walk_rows goes through a row.
SWEEP = {"load": 4, "stores": 8}
USUAL: dict[str, dict[str, Any]] = {
    **{"sweep": SWEEP, "sweep_short": SWEEP, "sweep_tiles": SWEEP, "measure_tiles": {"load": 4}},
    "turn": {"over": "FFMA"},
    "walk_rows": {"walks": True},
}

Report = dict[str, int]
Reports = dict[str, Report]  # file.kernel -> what it uses
Budget = dict[str, Reports]  # architecture -> what it may use


def nvcc() -> str | None:
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", "")]))


def cuobjdump() -> str | None:
    """The toolkit's own, or that which Triton brings."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    brought = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(brought) if brought.exists() else None)


def compile_all(architecture: str) -> Reports:
    """A report of each kernel. A warning is an error."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(lambda source: compile_file(source, architecture, Path(folder)), SOURCES)
        return {kernel: report for one in reports for kernel, report in one.items()}


def compile_file(source: Path, architecture: str, folder: Path) -> Reports:
    cubin = folder / f"{source.stem}.cubin"
    options = ["-std=c++17", f"-arch=sm_{architecture}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    said = run([nvcc(), "-cubin", *options, source, "-o", cubin]).stderr
    found = {
        name: resources(text) for name, text in re.findall(r"entry function '(\w+)'((?:.*\n)+?.*registers.*)", said)
    }
    for name, code in sass.kernels(run([cuobjdump(), "-sass", cubin]).stdout).items():
        found[name] |= accesses(code, next((USUAL[part] for part in USUAL if f"{len(part)}{part}" in name), {}))
    names = run(["c++filt", "-p", *found]).stdout.split("\n")
    return {
        f"{source.stem}.{re.sub(OUR_NAMESPACES, '', name).removeprefix('void ')}": report
        for name, report in zip(names, found.values(), strict=False)
    }


def run(command: list[object]) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr or done.stdout}")
    return done


def resources(said: str) -> Report:
    """Of ptxas's lines about one kernel."""

    def number(pattern: str) -> int:
        match = re.search(pattern, said)
        return int(match[1]) if match else 0

    return {
        "registers": number(r"Used (\d+) registers"),
        "shared": number(r"(\d+) bytes smem"),
        "stack": number(r"(\d+) bytes stack frame"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
    }


def accesses(code: list[tuple[int, sass.Instruction]], usual: dict[str, Any]) -> Report:
    """Bits of the widest load and store of global memory, and what sass.py says of the path."""
    found = {}
    for column, kind in (("load", "LDG"), ("store", "STG")):
        widths = [sass.width(step.name) for _, step in code if step.name.startswith(kind)]
        found[column] = 8 * max(widths, default=0)
    way = sass.path(code, **usual)
    return found | (way._asdict() if way else dict.fromkeys(sass.Path._fields, 0))


def read_budget() -> Budget:
    return json.loads(FILE.read_text())


def budget_of(reports: Reports) -> Reports:
    """What allows for these reports: registers and instructions with an eighth more, registers in the steps of 8 that
    they are handed out in."""
    return {
        kernel: {
            "registers": min(-(-report["registers"] * 9 // 64) * 8, MOST_REGISTERS),
            "shared": report["shared"],
            "instructions": report["instructions"] * 9 // 8,
            **{column: report[column] for column in AT_LEAST},
        }
        for kernel, report in sorted(reports.items())
    }


def breaches(allowed: Reports, reports: Reports) -> list[str]:
    """What the reports have against the budget of their architecture, a line each."""
    lines = [f"{kernel}: in budget.json, and not in csrc/cuda" for kernel in sorted(set(allowed) - set(reports))]
    for kernel, report in reports.items():
        if kernel not in allowed:
            lines.append(f"{kernel}: not in budget.json; compiled.py --renew adds it")
            continue
        bounds = {**allowed[kernel], "stack": 0, "spills": 0}
        for column, bound in bounds.items():
            word = "least" if column in AT_LEAST else "most"
            if report[column] < bound if word == "least" else report[column] > bound:
                lines.append(f"{kernel}: {column} {report[column]}, allowed at {word} {bound}")
    return lines


def write_budget(budget: Budget) -> None:
    blocks = []
    for architecture, allowed in budget.items():
        lines = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(bounds)}" for kernel, bounds in allowed.items())
        blocks.append(f'  "{architecture}": {{\n{lines}\n  }}')
    FILE.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--renew"]:
        write_budget({architecture: budget_of(compile_all(architecture)) for architecture in ARCHITECTURES})
    elif len(sys.argv) == 2 and sys.argv[1].isdigit():
        for kernel, report in compile_all(sys.argv[1]).items():
            print(json.dumps({"kernel": kernel, **report}))
    else:
        raise SystemExit(f"usage: {sys.argv[0]} {'|'.join(ARCHITECTURES)}|--renew")
