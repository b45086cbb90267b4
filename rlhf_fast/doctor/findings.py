"""What a check finds, and how checks are run."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.text import one_line

LEVELS = ("ok", "note", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    ``level``: one of LEVELS. ``found``: what is there, with numbers. ``why``: why it matters. ``change``: what to
    change. Both are empty if all is well. ``name``: the check. ``stage``: the stage that it looked at, empty for the
    machine and for several stages together.
    """

    level: str
    found: str
    why: str = ""
    change: str = ""
    name: str = ""
    stage: str = ""


Check = Callable[[Any], Finding | None]


def ok(found: str) -> Finding:
    return Finding("ok", found)


def note(found: str, why: str, change: str) -> Finding:
    return Finding("note", found, why, change)


def warning(found: str, why: str, change: str) -> Finding:
    return Finding("warning", found, why, change)


def error(found: str, why: str, change: str) -> Finding:
    return Finding("error", found, why, change)


def run_checks(stage: str, checks: Sequence[Check], subject: Any) -> Iterator[Finding]:
    """The findings of ``checks`` on one subject, each under its check's name."""
    for check in checks:
        found = run_one(check, subject)
        if found is not None:
            yield named(found, check.__name__, stage)


def named(found: Finding, name: str, stage: str) -> Finding:
    texts = {field: one_line(getattr(found, field)) for field in ("found", "why", "change")}
    return replace(found, name=name, stage=stage, **texts)


def run_one(check: Check, subject: Any) -> Finding | None:
    try:
        return check(subject)
    except UserError as mistake:
        return refused(mistake)
    except Exception as failure:  # the other checks still run
        return failed(failure)


def refused(mistake: UserError) -> Finding:
    return error(str(mistake), "A run stops with this line.", "What the line says.")


def failed(failure: Exception) -> Finding:
    place = traceback.extract_tb(failure.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return error(
        f"the check failed: {type(failure).__name__}: {failure} ({where})",
        "What it would have found is unknown, and a run may fail at the same place.",
        "Look at this line; report it if model, data and settings are right.",
    )


def share(count: int, total: int) -> str:
    """``12 of 400 rows (3.0%)``, without the word."""
    return f"{count} of {total} ({count / max(1, total):.1%})"
