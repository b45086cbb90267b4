"""``report.html``: one self-contained page made from the files of a run, at any point of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.metrics import stage_of
from rlhf_fast.monitor.axes import format_number, number
from rlhf_fast.monitor.files import encode, write_atomic
from rlhf_fast.monitor.log import read_steps
from rlhf_fast.monitor.panels import Panel, stage_panels
from rlhf_fast.monitor.style import CSS
from rlhf_fast.monitor.summary import read_summary
from rlhf_fast.text import printable

STAGES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO"}
MAX_SAMPLES = 12

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """What one stage has written so far."""

    name: str
    metrics: Sequence[Row]
    samples: Sequence[Row]
    summary: Row


def write_report(run_folder: Path) -> Path:
    """Write ``run_folder/report.html`` (atomically) and return its path.

    Args:
        run_folder: a run (``sft/``, ``reward/``, ``ppo/`` under it; those there are shown) or one stage's own folder,
            with ``metrics.jsonl`` in it.

    Raises:
        UserError: the folder holds no run; a file in it is broken; the page cannot be written.
    """
    folder = Path(run_folder)
    stages = _read_stages(folder)
    if not stages:
        names = ", ".join(f"{name}/metrics.jsonl" for name in STAGES)
        raise UserError(
            f"expected {folder} to hold metrics.jsonl or one of {names}; it holds none: give the output folder of a run"
        )
    resolved = folder / "config.resolved.yaml"  # where config.yaml is the file that the user gave
    config = resolved if resolved.exists() else folder / "config.yaml"
    settings = config.read_text(encoding="utf-8", errors="replace") if config.exists() else None
    path = folder / "report.html"
    write_atomic(path, encode(_page(folder.resolve().name, stages, settings)))
    return path


def _read_stages(folder: Path) -> list[Stage]:
    if (folder / "metrics.jsonl").exists():
        return [_read_stage(folder, None)]
    return [_read_stage(folder / name, name) for name in STAGES if (folder / name / "metrics.jsonl").exists()]


def _read_stage(folder: Path, name: str | None) -> Stage:
    metrics = read_steps(folder / "metrics.jsonl")
    samples = folder / "samples.jsonl"
    summary = read_summary(folder) or {}
    # a stage on its own has no summary.json until it ends; its metrics tell which it is
    name = name or summary.get("stage") or stage_of({key for row in metrics for key in row})
    if name not in STAGES:
        raise UserError(f"{folder / 'summary.json'}: expected stage to be one of {', '.join(STAGES)}, came {name!r}")
    return Stage(name, metrics, read_steps(samples) if samples.exists() else [], summary)


def _page(title: str, stages: Sequence[Stage], settings: str | None) -> str:
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    links = "".join(f'<a href="#{stage.name}">{STAGES[stage.name]}</a>' for stage in stages)
    config = (
        f'<details class="card"><summary>Configuration</summary><pre>{_text(settings)}</pre></details>'
        if settings is not None
        else ""
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        # the page asks for nothing from outside; this makes the browser hold it to that
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}: run report</title><style>{CSS}</style></head><body><main>"
        f"<header><h1>{_text(title)}</h1><p>Run report, written {written}</p><nav>{links}</nav></header>"
        f"{''.join(map(_stage_html, stages))}{config}</main></body></html>\n"
    )


def _stage_html(stage: Stage) -> str:
    last = f" <small>up to step {max(row['step'] for row in stage.metrics):,}</small>" if stage.metrics else ""
    panels = "".join(map(_panel, stage_panels(stage.name, stage.metrics, stage.summary)))
    grid = f'<div class="grid">{panels}</div>' if panels else ""
    return (
        f'<section id="{stage.name}"><h2>{STAGES[stage.name]}{last}</h2>'
        f"{_headline(stage.summary.get('figures') or {})}"
        f"{grid}{_samples(stage)}</section>"
    )


def _panel(panel: Panel) -> str:
    return (
        f'<figure class="card"><h3>{escape(panel.title)}</h3><p>{escape(panel.explanation)}</p>'
        f"{''.join(panel.charts)}</figure>"
    )


def _headline(figures: Row) -> str:
    """The stage's figures; the interval and note columns are there when some figure has one."""
    entries = {name: value if isinstance(value, Mapping) else {"value": value} for name, value in figures.items()}
    if not entries:
        return ""
    intervals = any(entry.get("low") is not None and entry.get("high") is not None for entry in entries.values())
    notes = any(entry.get("note") for entry in entries.values())
    head = '<th scope="col">Figure</th><th scope="col" class="number">Value</th>'
    head += '<th scope="col" class="number">95% interval</th>' if intervals else ""
    head += '<th scope="col">Note</th>' if notes else ""
    body = []
    for name, entry in entries.items():
        value, low, high = entry.get("value"), entry.get("low"), entry.get("high")
        kind = "words" if isinstance(value, str) else "number"
        interval = "" if low is None or high is None else f"{_value(low)} to {_value(high)}"
        cells = f'<th scope="row">{_text(name)}</th><td class="{kind}">{_value(value)}</td>'
        cells += f'<td class="number">{interval}</td>' if intervals else ""
        cells += f'<td class="note">{_text(entry.get("note") or "")}</td>' if notes else ""
        body.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="card headline"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _samples(stage: Stage) -> str:
    """Held-out prompts with the response at the first evaluation and at the last, paired by index."""
    rows = [row for row in stage.samples if row.get("split") == "eval" and "response" in row and "index" in row]
    if not rows:
        return ""
    steps = sorted({row["step"] for row in rows} & {min(row["step"] for row in rows), max(row["step"] for row in rows)})
    responses = {step: {row["index"]: row for row in rows if row["step"] == step} for step in steps}
    shared = sorted(set.intersection(*(set(by_index) for by_index in responses.values())))[:MAX_SAMPLES]
    if not shared:
        return ""
    labels = {step: _sample_label(stage.name, step) for step in steps}
    head = "".join(f'<th scope="col">{label}</th>' for label in ["Prompt", *labels.values()])
    title = "Held-out prompts" if len(steps) == 1 else "The same held-out prompts, before and after"
    body = []
    for index in shared:
        prompt = _text(responses[steps[0]][index].get("prompt", ""))
        cells = f'<td data-label="Prompt"><div class="text">{prompt}</div></td>'
        for step in steps:
            row = responses[step][index]
            cells += (
                f'<td data-label="{labels[step]}"><div class="text">{_text(row["response"])}</div>'
                f'<div class="scores">{_scores(row)}</div></td>'
            )
        body.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="card samples"><h3>{title}</h3><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _sample_label(stage: str, step: int) -> str:
    if stage == "ppo":
        return "SFT model (step 0)" if step == 0 else f"PPO policy, step {step:,}"
    return f"Step {step:,}"


def _scores(row: Row) -> str:
    named = {"score": row.get("score"), "gold": row.get("gold")}
    return " · ".join(f"{name} {_value(value)}" for name, value in named.items() if value is not None)


def _value(value: Any) -> str:
    """A figure as people write it; what was not a finite number is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return "–" if number(value) is None else format_number(value)
    return _text(value)


def _text(value: Any) -> str:
    """Escaped for HTML; characters that hide or turn text are shown as escapes."""
    return escape(printable(str(value)))
