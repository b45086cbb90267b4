"""``report.html``: a self-contained page made from the files of a run, also while it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from rlhf_fast.errors import UserError
from rlhf_fast.files import write_atomic
from rlhf_fast.metrics import stage_of
from rlhf_fast.monitor.axes import format_number, number
from rlhf_fast.monitor.log import read_steps
from rlhf_fast.monitor.panels import stage_panels
from rlhf_fast.monitor.summary import read_summary
from rlhf_fast.text import printable

STAGES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "dpo": "DPO", "ppo": "PPO"}
MAX_SAMPLES = 12


def _shown(value: Any) -> Any:
    """A text for the page, with control characters and characters that change the text direction as escapes."""
    return value if isinstance(value, Markup) else printable(str(value))


# Every value that a template inserts goes through ``_shown`` and is then escaped for HTML.
PAGES = Environment(
    loader=PackageLoader("rlhf_fast.monitor", "page"),
    autoescape=True,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """The files that one stage has written so far."""

    name: str
    metrics: Sequence[Row]
    samples: Sequence[Row]
    summary: Row


def write_report(run_folder: Path) -> Path:
    """Write ``run_folder/report.html`` (atomically) and return its path.

    Args:
        run_folder: the folder of a run, with some of ``sft/``, ``reward/``, ``dpo/`` and ``ppo/`` in it, or the folder
            of a stage, with ``metrics.jsonl`` in it.

    Raises:
        UserError: the folder contains no run; a file in it is broken; the page cannot be written.
    """
    folder = Path(run_folder)
    stages = _read_stages(folder)
    if not stages:
        names = ", ".join(f"{name}/metrics.jsonl" for name in STAGES)
        raise UserError(
            f"expected {folder} to hold metrics.jsonl or one of {names}; it holds none: give the output folder of a run"
        )
    resolved = folder / "config.resolved.yaml"  # exists if config.yaml is the user's file
    config = resolved if resolved.exists() else folder / "config.yaml"
    settings = config.read_text(encoding="utf-8", errors="replace") if config.exists() else None
    path = folder / "report.html"
    write_atomic(path, _page(folder.resolve().name, stages, settings))
    return path


def _read_stages(folder: Path) -> list[Stage]:
    if (folder / "metrics.jsonl").exists():
        return [_read_stage(folder, None)]
    return [_read_stage(folder / name, name) for name in STAGES if (folder / name / "metrics.jsonl").exists()]


def _read_stage(folder: Path, name: str | None) -> Stage:
    metrics = read_steps(folder / "metrics.jsonl")
    samples = folder / "samples.jsonl"
    summary = read_summary(folder) or {}
    # a single stage has no summary.json until it ends; its metrics show which stage it is
    name = name or summary.get("stage") or stage_of({key for row in metrics for key in row})
    if name not in STAGES:
        raise UserError(f"{folder / 'summary.json'}: expected stage to be one of {', '.join(STAGES)}, got {name!r}")
    return Stage(name, metrics, read_steps(samples) if samples.exists() else [], summary)


def _page(title: str, stages: Sequence[Stage], settings: str | None) -> str:
    return PAGES.get_template("report.html.jinja").render(
        title=title,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        stages=[_section(stage) for stage in stages],
        settings=settings,
    )


def _section(stage: Stage) -> dict[str, Any]:
    return {
        "id": stage.name,
        "title": STAGES[stage.name],
        "last_step": f"{max(row['step'] for row in stage.metrics):,}" if stage.metrics else "",
        "headline": _headline(stage.summary.get("figures") or {}),
        "panels": stage_panels(stage.name, stage.metrics, stage.summary),
        "samples": _samples(stage),
    }


def _headline(figures: Row) -> dict[str, Any]:
    """The stage's figures; whether any has an interval, and whether any has a note."""
    rows = []
    for name, figure in figures.items():
        entry = figure if isinstance(figure, Mapping) else {"value": figure}
        value, low, high = entry.get("value"), entry.get("low"), entry.get("high")
        rows.append(
            {
                "name": name,
                "value": _value(value),
                "kind": "words" if isinstance(value, str) else "number",
                "interval": "" if low is None or high is None else f"{_value(low)} to {_value(high)}",
                "note": entry.get("note") or "",
            }
        )
    return {"rows": rows, "intervals": any(row["interval"] for row in rows), "notes": any(row["note"] for row in rows)}


def _samples(stage: Stage) -> dict[str, Any]:
    """Held-out prompts with the responses at the first and the last evaluation, paired by index."""
    rows = [row for row in stage.samples if row.get("split") == "eval" and "response" in row and "index" in row]
    steps = sorted({min(row["step"] for row in rows), max(row["step"] for row in rows)}) if rows else []
    at = [{row["index"]: row for row in rows if row["step"] == step} for step in steps]
    shared = sorted(set(at[0]).intersection(*at[1:]))[:MAX_SAMPLES] if at else []
    return {
        "title": "Held-out prompts" if len(steps) == 1 else "The same held-out prompts, before and after",
        "labels": [_sample_label(stage.name, step) for step in steps],
        "rows": [
            {
                "prompt": at[0][index].get("prompt", ""),
                "responses": [{"text": one[index]["response"], "scores": _scores(one[index])} for one in at],
            }
            for index in shared
        ],
    }


def _sample_label(stage: str, step: int) -> str:
    if stage == "ppo":
        return "SFT model (step 0)" if step == 0 else f"PPO policy, step {step:,}"
    return f"Step {step:,}"


def _scores(row: Row) -> str:
    named = {"score": row.get("score"), "gold": row.get("gold")}
    return " · ".join(f"{name} {_value(value)}" for name, value in named.items() if value is not None)


def _value(value: Any) -> str:
    """A formatted figure; a dash for null and numbers that are not finite."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return "–" if number(value) is None else format_number(value)
    return str(value)
