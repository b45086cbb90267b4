"""Counts of kept, dropped and truncated rows, with reasons. Printed at the start of every run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_fast.data.rows import Fault
from rlhf_fast.errors import UserError

MAX_UNUSABLE = 0.5


@dataclass(slots=True)
class DataReport:
    """Counts over one data set.

    A dropped row has nothing to train on (such as an empty response) or does not fit. A rejected row has a wrong
    structure and counts as unusable. A share of unusable rows above ``max_unusable`` is an error; with ``strict``, the
    first one is.

    ``first``: for each reason in ``dropped``, the first row dropped for it, from 1. ``file_lines``: the line of each
    row in its file, if known. ``total``: the number of rows and unreadable lines.
    """

    source: str
    kept: int = 0
    truncated: int = 0
    repeated_prompts: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    strict: bool = False
    max_unusable: float = MAX_UNUSABLE
    file_lines: Sequence[int] = ()
    total: int = 0
    unusable: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)
    _places: dict[str, str] = field(default_factory=dict)
    _first_wrong: str = ""

    def drop(self, reason: str, row: int) -> None:
        """Count one row (from 1) as dropped for ``reason``."""
        self._count(reason, row, self.place(row))

    def reject(self, reason: str, row: int, detail: str = "") -> None:
        """Count one row as unusable; ``detail``, which differs from row to row, continues ``reason`` in messages.

        Raises UserError if ``strict``.
        """
        self._unusable(reason, row, self.place(row), detail)

    def fault(self, fault: Fault) -> None:
        """Count one line of the file that could not be read as a row."""
        detail = f" ({fault.detail})" if fault.detail else ""
        self._unusable(fault.reason, fault.number, f"{fault.unit} {fault.number}", detail)

    def note(self, what: str, row: int, detail: str = "") -> None:
        """Count one kept row with a note. With ``row`` 0, ``detail`` names the place."""
        count, first = self.notes.get(what, (0, f"{self.place(row)}{detail}" if row else detail))
        self.notes[what] = count + 1, first

    def place(self, row: int) -> str:
        """``row 2``, and its line in the file if the numbers differ."""
        line = self.file_lines[row - 1] if self.file_lines else row
        return f"row {row}" if line == row else f"row {row} (line {line})"

    def require_usable(self) -> None:
        """Raises UserError, naming the first one, if more than the allowed share of ``total`` rows is unusable."""
        if self.unusable > self.max_unusable * self.total:
            count = f"; {self.unusable} of {self.total} rows cannot be used" if self.total > 1 else ""
            raise UserError(f"{self._first_wrong}{count}")

    def form(self) -> str:
        """A line for the user on how prompts are written: as chat turns or plain text."""
        forms = [form if len(self.forms) == 1 else f"{form} ({count})" for form, count in self.forms.items()]
        return f"{self.source}: prompts are {'; '.join(forms)}"

    def lines(self) -> list[str]:
        """The report for the user, one fact per line."""
        lines = [f"{self.source}: {self.kept} rows kept"]
        for reason, count in self.dropped.items():
            lines.append(f"{count} dropped: {reason} (first: {self._places[reason]})")
        for what, (count, first) in self.notes.items():
            lines.append(f"{count} {what} (first: {first})")
        lines += self.facts
        if self.truncated:
            lines.append(f"{self.truncated} truncated to the longest length")
        if self.repeated_prompts:
            lines.append(f"{self.repeated_prompts} prompts repeat an earlier one (kept)")
        return lines

    def require_rows(self) -> None:
        """Raises UserError, with the reasons for dropping, if no row was kept."""
        if self.kept == 0:
            reasons = "; ".join(self.lines()[1:]) or "it has no rows"
            raise UserError(f"{self.source}: no usable row is left ({reasons})")

    def _unusable(self, reason: str, number: int, place: str, detail: str) -> None:
        text = f"{self.source}, {place}: {reason}{detail}"
        if self.strict:
            raise UserError(text)
        self.unusable += 1
        self._first_wrong = self._first_wrong or text
        self._count(reason, number, f"{place}{detail}")

    def _count(self, reason: str, number: int, place: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first.setdefault(reason, number)
        self._places.setdefault(reason, place)
