"""The log files of one stage: ``metrics.jsonl`` and ``samples.jsonl``, one JSON object per line."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.files import cannot_write, encode, to_json, write_atomic
from rlhf_fast.text import one_line, shown


class RunLog:
    """Appends a stage's metrics and samples to ``folder``.

    Every line has been passed to the operating system when the call returns, so a killed run loses no lines.

    Args:
        folder: the stage's folder; created if missing.
        resume_step: the step of the checkpoint from which the run resumes. Lines of later steps, which will be
            repeated, and an incomplete last line are dropped. None: a new run.

    Raises:
        UserError: a new run in a folder with another run's lines; a broken line; a folder that cannot be written.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        self._metrics = Path(folder) / "metrics.jsonl"
        self._samples = Path(folder) / "samples.jsonl"
        existing = [path for path in (self._metrics, self._samples) if path.exists()]
        if resume_step is None and existing:
            raise UserError(
                f"expected a new folder, but {existing[0]} holds another run: "
                "choose another output folder, resume that run, or remove the file"
            )
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(Path(folder), error) from error
        if resume_step is not None:
            for path in existing:
                _drop_after(path, resume_step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append ``{"step": step, name: value, ...}``; NaN and infinities are written as null.

        Raises:
            UserError: the line could not be written (such as on a full disk); earlier lines are complete.
        """
        _append(self._metrics, [_line(step, values)])

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one line per row, each with the step; errors as in :meth:`metrics`."""
        _append(self._samples, [_line(step, row) for row in rows])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, in order.

    A last line without newline that does not parse is left out: a killed run did not finish it.

    Raises:
        UserError: the file cannot be read, or any other line is broken; names the file and the line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")  # not splitlines(), which also splits at U+2028 inside a text
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror or error}") from error
    objects = []
    for number, line in enumerate(lines, start=1):
        is_last = number == len(lines)
        if is_last and not line:  # nothing after the last newline
            break
        try:
            value = json.loads(line)  # for bytes, a UTF-8 error is a ValueError too
        except (ValueError, RecursionError) as error:
            if is_last:
                break
            what = one_line(str(error), 200)
            raise UserError(
                f"{path}, line {number}: expected a JSON object, got {line[:60]!r} ({what}); remove the line"
            ) from error
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}; remove the line")
        objects.append(value)
    return objects


def read_steps(path: Path) -> list[dict[str, Any]]:
    """:func:`read_lines`; UserError, naming the line, if a line has no integer under ``"step"``."""
    rows = read_lines(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise UserError(
                f'{path}, line {number}: expected a whole number under "step", got {shown(row.get("step"))}; remove it'
            )
    return rows


def _line(step: int, values: Mapping[str, Any]) -> str:
    return to_json({"step": step} | dict(values) | {"step": step})  # step comes first, and values cannot replace it


def _append(path: Path, lines: Sequence[str]) -> None:
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(encode("".join(f"{line}\n" for line in lines)))
    except OSError as error:
        if path.exists():
            os.truncate(path, size)  # removes partly written lines
        raise cannot_write(path, error) from error


def _drop_after(path: Path, last_step: int) -> None:
    kept = [f"{to_json(row)}\n" for row in read_steps(path) if row["step"] <= last_step]
    write_atomic(path, "".join(kept))
