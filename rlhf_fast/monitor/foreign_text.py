"""Metrics from text: the console output of verl and OpenRLHF, and CSV exports of wandb."""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.text import shown

VERL = re.compile(r"\bstep:(\d+) - ([^\r\n]*)")
OPENRLHF = re.compile(r"\b(?:Global step |Eval at step |global_step )(\d+)(?:: |, eval_metrics: )(\{[^\r\n]*\})")
# a Python number, which may be a numpy or torch one: 0.25, np.float64(0.25), tensor(0.25)
NUMBER = r"(?:[\w.]+\()?([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf))"
VERL_VALUE = re.compile(rf"(.+?):{NUMBER}\)?")
OPENRLHF_VALUE = re.compile(rf"'([^']+)': {NUMBER}")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def console_steps(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and metrics of each line that verl or OpenRLHF prints for a step.

    verl: ``step:12 - actor/kl_loss:0.01 - ...``; OpenRLHF: ``Global step 12: {'policy_loss': 0.1, ...}``. Other lines,
    and a last line without its newline, are passed over.

    Raises:
        UserError: the file cannot be read, or there is no such line.
    """
    found = False
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                metrics = _metrics(COLOURS.sub("", line)) if line.endswith("\n") else None
                if metrics is not None:
                    found = True
                    yield metrics
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror or error}") from error
    if not found:
        raise UserError(
            f"{path}: expected lines such as 'step:12 - actor/kl_loss:0.01 - ...' (verl) or "
            f"\"Global step 12: {{'policy_loss': 0.1, ...}}\" (OpenRLHF); got none"
        )


def _metrics(line: str) -> tuple[int, dict[str, float]] | None:
    if match := VERL.search(line):
        values = (VERL_VALUE.fullmatch(part.strip()) for part in match[2].split(" - "))
        return int(match[1]), {value[1]: float(value[2]) for value in values if value}
    if match := OPENRLHF.search(line):
        return int(match[1]), {name: float(value) for name, value in OPENRLHF_VALUE.findall(match[2])}
    return None


def csv_steps(path: Path, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and metrics of each row. A column of a chart's export, ``RUN - NAME``, is ``NAME``; those of its lowest and
    highest values (``__MIN``, ``__MAX``) are left out. A last row without all its columns is left out.

    Args:
        keys: columns that may hold the step, the best first.

    Raises:
        UserError: the file is no CSV, has no column of steps, or has several runs.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            table = list(csv.reader(file))
    except (OSError, csv.Error) as error:
        raise UserError(f"could not read {path} as CSV: {error}") from error
    header = table[0] if table else []
    key = next((name for name in keys if name in header), None)
    if key is None:
        raise UserError(f"{path}: expected a column of steps ({', '.join(keys)}), got the columns {shown(header)}")
    runs = {column.rpartition(" - ")[0] for column in header if " - " in column}
    if len(runs) > 1:
        raise UserError(f"{path}: expected the columns of one run, got those of {len(runs)}: {shown(sorted(runs))}")
    names = [column.rpartition(" - ")[2] for column in header]
    for number, row in enumerate(table[1:], start=2):
        if len(row) != len(header):
            if not row or number == len(table):
                continue
            raise UserError(f"{path}, row {number}: expected {len(header)} columns, got {len(row)}")
        step = _number(row[header.index(key)])
        if not step.is_integer():
            raise UserError(f"{path}, row {number}: expected a whole number as {key}, got {row[header.index(key)]!r}")
        cells = {name: _number(text) for name, text in zip(names, row, strict=True)}
        yield int(step), {name: value for name, value in cells.items() if not name.endswith(("__MIN", "__MAX"))}


def _number(text: str) -> float:
    """NaN for an empty cell and for words."""
    try:
        return float(text)
    except ValueError:
        return math.nan
