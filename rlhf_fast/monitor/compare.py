"""What several runs have beside each other: their figures, and the settings that differ."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_fast.monitor.figures import Figure, figure_words, read_figures
from rlhf_fast.monitor.numbers import format_value
from rlhf_fast.monitor.runs import Row, Run, Stage

UNSET = "not set"


def figures_beside(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """A row for each figure that any of the runs has: its words, and the figure of each run (None where it lacks)."""
    each: list[dict[str, Figure]] = [read_figures(stage.figures) for stage in stages]
    keys = read_figures({key: None for figures in each for key in figures})
    return [{"words": figure_words(key), "figures": [figures.get(key) for figures in each]} for key in keys]


def settings_that_differ(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(name, the value in each run). Paths inside the output folders count as equal."""
    flat = [_flat(run.config()) for run in runs]
    names = sorted({name for settings in flat for name in settings})
    rows = []
    for name in names:
        values = [settings.get(name, UNSET) for settings in flat]
        if len(set(values)) > 1:
            rows.append((name, values))
    return rows


def _flat(config: Row) -> dict[str, str]:
    """Dotted name -> the value as text, in which the output folder is a dot."""
    home = str(config.get("output_dir") or next((v["output_dir"] for v in _sections(config) if "output_dir" in v), ""))
    found: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, entry in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), entry)
        elif prefix.rpartition(".")[2] not in ("output_dir", "run_name"):
            text = ", ".join(map(str, value)) if isinstance(value, list) else format_value(value)
            found[prefix] = re.sub(rf"(?<![^,\s]){re.escape(home)}(?![^/,:])", ".", text) if home else text

    walk("", config)
    return found


def _sections(config: Row) -> list[Row]:
    return [value for value in config.values() if isinstance(value, Mapping)]
