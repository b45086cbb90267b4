"""The final figures of a stage: a table on the terminal, and ``summary.json`` for the report and other programs."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf_fast.errors import UserError
from rlhf_fast.files import to_json, write_atomic
from rlhf_fast.monitor.terminal import Terminal
from rlhf_fast.text import one_line, printable, unread_allowed


def print_summary(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Print a table to standard output; a row is figure, value, note."""
    table = Table(title=Text(printable(title), style="bold"), title_justify="left")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("note", style="dim")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    with unread_allowed(sys.stdout):
        Terminal().print(table)


def write_summary(folder: Path, stage: str, figures: Mapping[str, Any]) -> Path:
    """Write ``folder/summary.json`` (atomically) and return its path.

    Args:
        folder: the stage's folder.
        stage: ``sft``, ``reward``, ``dpo`` or ``ppo``.
        figures: name -> a number, a text, or ``{"value", "low", "high", "note"}``, written under ``"figures"`` for the
            report's headline table. A list (``reliability``, ``margin_buckets``) is the data of a curve, written at the
            top level under its name. NaN and infinities become null.

    Raises:
        UserError: the file cannot be written.
    """
    curves = {name: value for name, value in figures.items() if isinstance(value, list)}
    headline = {name: value for name, value in figures.items() if name not in curves}
    path = Path(folder) / "summary.json"
    text = to_json({**curves, "stage": stage, "figures": headline}, indent=2, sort_keys=True)
    write_atomic(path, f"{text}\n")
    return path


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The content of :func:`write_summary`: ``{"stage", "figures", ...curves}``; None if the stage has not ended yet.

    Raises:
        UserError: the file exists and is not a JSON object.
    """
    path = Path(folder) / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        what = one_line(str(error), 200)
        raise UserError(f"{path}: expected a JSON object ({what}); remove the file, the next run writes it") from error
    if not isinstance(summary, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(summary).__name__}; remove the file")
    return summary
