"""``verdicts.json``: what the monitor has found in a stage so far."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.files import to_json, write_atomic
from rlhf_fast.text import one_line, shown
from rlhf_fast.verdicts import KINDS
from rlhf_fast.verdicts import Verdict as Verdict

FILE = "verdicts.json"


def as_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """``{"verdicts": [...]}``, each with the attributes of :class:`~rlhf_fast.verdicts.Verdict`."""
    return {"verdicts": [dataclasses.asdict(verdict) for verdict in verdicts]}


def write_verdicts(folder: Path, verdicts: Sequence[Verdict]) -> Path:
    """Writes ``folder/verdicts.json`` (atomically) and returns its path.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(folder) / FILE
    write_atomic(path, f"{to_json(as_json(verdicts), indent=1)}\n")
    return path


def read_verdicts(folder: Path) -> list[Verdict]:
    """The verdicts of ``folder/verdicts.json``; none where the file is not there.

    Raises:
        UserError: the file is not what :func:`write_verdicts` writes.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    try:
        found = [Verdict(**entry) for entry in json.loads(path.read_bytes())["verdicts"]]
        wrong = [shown(verdict.name) for verdict in found if not _is_whole(verdict)]
        if not wrong:
            return found
        what = f"wrong values, or a name that this version does not know, in {wrong[0]}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
    raise UserError(f'{path}: expected {{"verdicts": [...]}} ({one_line(what, 200)}); remove the file')


def _is_whole(verdict: Verdict) -> bool:
    """Whether each attribute has the type that it must have."""
    lists = isinstance(verdict.metrics, list) and isinstance(verdict.samples, list)
    return (
        verdict.name in KINDS
        and isinstance(verdict.first_step, int)
        and isinstance(verdict.last_step, int)
        and isinstance(verdict.confidence, int | float)
        and lists
        and all(isinstance(name, str) for name in verdict.metrics)
        and all(isinstance(sample, dict) for sample in verdict.samples)
        and isinstance(verdict.reason, str)
        and isinstance(verdict.advice, str)
    )
