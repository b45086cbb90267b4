"""budget.json: what each Triton kernel may use on each target, one line a pair.

    registers    at most so many a thread
    load, store  the widest is at least so many bits, where calls.py expects wide ones

Stack, local memory and spills are 0 (but see STACK_OF_3_6), and shared memory is within the target's limit.
"""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("budget.json")
# Target -> bytes of shared memory that a program may have.
TARGETS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MOST_REGISTERS = 255
# What the assembler of Triton 3.6 alone puts on the stack, for the last program of the launch.
STACK_OF_3_6 = {("ppo_loss._evaluate", "sm_90"): 16}

Reports = list[dict[str, Any]]
Budget = dict[str, dict[str, dict[str, int]]]  # kernel -> target -> column -> bound


def read_budget() -> Budget:
    return json.loads(FILE.read_text())


def write_budget(budget: Budget) -> None:
    kernels = []
    for kernel, targets in sorted(budget.items()):
        lines = ",\n".join(f'    "{target}": {json.dumps(targets[target])}' for target in TARGETS)
        kernels.append(f'  "{kernel}": {{\n{lines}\n  }}')
    FILE.write_text("{\n" + ",\n".join(kernels) + "\n}\n")


def extended(budget: Budget, reports: Reports, target: str) -> Budget:
    """The budget that holds these reports too."""
    extended = {kernel: dict(targets) for kernel, targets in budget.items()}
    for report in reports:
        bounds = extended.setdefault(report["kernel"], {}).setdefault(target, {"registers": 0})
        bounds["registers"] = max(bounds["registers"], _with_margin(report["registers"]))
        if report["wide"]:
            for column in ("load", "store"):
                bounds[column] = min(bounds.get(column, report[column]), report[column])
    return extended


def _with_margin(registers: int) -> int:
    """An eighth more, in the steps of 8 that registers are handed out in."""
    return min(-(-registers * 9 // 64) * 8, MOST_REGISTERS)


def breaches(budget: Budget, reports: Reports, target: str) -> list[str]:
    """What the reports have against the budget, a line each."""
    lines = []

    def hold(report: dict[str, Any], column: str, least: int, most: int, unit: str) -> None:
        if not least <= report[column] <= most:
            allowed = f"at most {most}" if report[column] > most else f"at least {least}"
            found = f"{column} {report[column]} {unit}, allowed {allowed}"
            lines.append(f"{report['kernel']} on {target}: {found} [{report['form']}]")

    for report in reports:
        bounds = budget.get(report["kernel"], {}).get(target)
        if bounds is None:
            lines.append(f"{report['kernel']} on {target}: not in budget.json; compile_ahead.py --extend adds it")
            continue
        hold(report, "registers", 0, bounds["registers"], "a thread")
        old = report["triton"].startswith("3.6.")
        hold(report, "stack", 0, STACK_OF_3_6.get((report["kernel"], target), 0) if old else 0, "bytes")
        hold(report, "local", 0, 0, "bytes")
        hold(report, "spills", 0, 0, "bytes")
        hold(report, "shared", 0, TARGETS[target], "bytes")
        if report["wide"]:
            for column in ("load", "store"):
                hold(report, column, bounds.get(column, 0), 1024, "bits")
    for kernel in sorted(set(budget) - {report["kernel"] for report in reports}):
        lines.append(f"{kernel} on {target}: in budget.json, and no call in calls.py launches it")
    return lines
