"""Prints findings: a table for a person, or JSON."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from rlhf_fast.doctor.findings import LEVELS, Finding
from rlhf_fast.files import to_json
from rlhf_fast.monitor.terminal import Terminal
from rlhf_fast.text import tell, unread_allowed

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def print_json(findings: Sequence[Finding]) -> None:
    tell(to_json({"findings": [asdict(finding) for finding in findings]}, indent=2), sys.stdout)


def print_findings(findings: Sequence[Finding]) -> None:
    """A table to standard output, what is wrong last; and the counts."""
    table = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("level", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found")
    for finding in sorted(findings, key=lambda finding: LEVELS.index(finding.level)):
        style = STYLES[finding.level]
        if finding.level != "ok":
            table.add_row()
        said = Text(finding.found, style="dim" if finding.level == "ok" else "")
        if finding.why:
            said.append(f"\nWhy: {finding.why}", style="dim")
        if finding.change:
            said.append(f"\nChange: {finding.change}", style="bold")
        table.add_row(Text(finding.level, style=style), Text(f"{finding.stage} {finding.name}".strip()), said)
    counts = Counter(finding.level for finding in findings)
    with unread_allowed(sys.stdout):
        Terminal().print(table)
    tell(", ".join(f"{counts[level]} {level}" for level in LEVELS), sys.stdout)
