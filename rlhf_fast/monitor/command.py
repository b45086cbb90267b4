"""`rlhf-fast monitor RUN_OR_LOG`: what went wrong in a run, from its logs."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from rlhf_fast.config import STAGES
from rlhf_fast.config_yaml import read_yaml
from rlhf_fast.errors import UserError
from rlhf_fast.monitor.foreign import Log, read_log
from rlhf_fast.monitor.monitor import watch
from rlhf_fast.monitor.terminal import Terminal
from rlhf_fast.monitor.verdict import as_json
from rlhf_fast.text import one_line, printable, tell, unread_allowed
from rlhf_fast.verdicts import Verdict

FOUND = 3  # the exit code where there is a verdict


def monitor(path: Path, thresholds: Mapping[str, float], *, as_text: bool) -> int:
    """Prints the verdicts on a run or log; returns 0, or FOUND where there is one.

    Args:
        path: a run's folder, a stage's folder, or a log file.
        thresholds: name -> number, in place of the run's own or the defaults.
        as_text: for a person; otherwise as JSON, with the stage beside each verdict.

    Raises:
        UserError: no log there, a broken one, an unknown threshold.
    """
    logs = {stage: read_log(folder) for stage, folder in _stages(path)}
    found = [(stage, verdict) for stage, log in logs.items() for verdict in _verdicts(log, thresholds)]
    if as_text:
        for log in logs.values():
            tell(f"{log.path} ({log.kind}): {len(log.rows)} logged steps", sys.stdout)
        _print(found)
    else:
        entries = as_json([verdict for _, verdict in found])
        for (stage, _), entry in zip(found, entries["verdicts"], strict=True):
            entry["stage"] = stage
        tell(json.dumps(entries, indent=1), sys.stdout)
    return FOUND if found else 0


def _stages(path: Path) -> list[tuple[str, Path]]:
    """(stage or "", folder or file) of each log under ``path``."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run's folder, a stage's folder, or a log file")
    whole = [(stage, path / stage) for stage in STAGES if (path / stage / "metrics.jsonl").exists()]
    return whole or [("", path)]


def _verdicts(log: Log, thresholds: Mapping[str, float]) -> list[Verdict]:
    return watch(log.rows, log.samples, {**_own_thresholds(log.path), **thresholds}).verdicts


def _own_thresholds(path: Path) -> dict[str, float]:
    """Those of the run's own settings, where it is one of ours."""
    folder = path if path.is_dir() else path.parent
    files = [folder / name for name in ("config.resolved.yaml", "config.yaml") if (folder / name).exists()]
    return (read_yaml(str(files[0])).get("monitor_thresholds") or {}) if files else {}


def _print(found: list[tuple[str, Verdict]]) -> None:
    if not found:
        tell("nothing found", sys.stdout)
        return
    parts: list[Any] = []
    for stage, verdict in found:
        steps = f"steps {verdict.first_step:,} to {verdict.last_step:,}, confidence {verdict.confidence:.0%}"
        where = f"{stage}: " if stage else ""
        parts.append(Text(f"{where}{verdict.title} ({verdict.name}), {steps}", style="bold"))
        body = [Text(f"{verdict.reason[0].upper()}{printable(verdict.reason[1:])}.")]
        body.append(Text(f"Metrics: {', '.join(verdict.metrics)}", style="dim"))
        for sample in verdict.samples:
            at = [f"step {sample['step']}"]
            at += [f"{key} {sample[key]:.3g}" for key in ("score", "kl") if isinstance(sample.get(key), int | float)]
            said = one_line(str(sample.get("response", "")), 160)
            body.append(Text(f"  {', '.join(at)}: {said}"))
        body.append(Text(f"Try: {verdict.advice}"))
        parts.append(Padding(Group(*body), (0, 0, 1, 2)))
    with unread_allowed(sys.stdout):
        Terminal().print(Group(*parts))
