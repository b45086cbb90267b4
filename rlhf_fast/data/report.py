"""What became of the rows: kept, dropped and why, truncated. Printed at the start of every run."""

from dataclasses import dataclass, field

from rlhf_fast.errors import UserError


@dataclass(slots=True)
class DataReport:
    """Counts over one data set. ``first`` holds, for each reason in ``dropped``, the first row dropped for it."""

    source: str
    kept: int = 0
    truncated: int = 0
    repeated_prompts: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        """Count one row (1-based) as dropped for ``reason``."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first.setdefault(reason, row)

    def lines(self) -> list[str]:
        """The report for a person, one fact a line."""
        lines = [f"{self.source}: {self.kept} rows kept"]
        for reason, count in self.dropped.items():
            lines.append(f"{count} dropped: {reason} (first: row {self.first[reason]})")
        if self.truncated:
            lines.append(f"{self.truncated} truncated to the longest length")
        if self.repeated_prompts:
            lines.append(f"{self.repeated_prompts} prompts repeat an earlier one (kept)")
        return lines

    def require_rows(self) -> None:
        """UserError, saying what every row was dropped for, where nothing was kept."""
        if self.kept == 0:
            reasons = "; ".join(self.lines()[1:]) or "it has no rows"
            raise UserError(f"{self.source}: no usable row is left ({reasons})")
