"""``report.html``: a self-contained page made from the files of a run, also while it runs; and of several runs beside
each other."""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from rlhf_fast.errors import UserError
from rlhf_fast.files import write_atomic
from rlhf_fast.monitor.compare import figures_beside, settings_that_differ
from rlhf_fast.monitor.figures import read_figures
from rlhf_fast.monitor.overview import sentences, verdict_list
from rlhf_fast.monitor.panels import Panel, metric_links, stage_panels
from rlhf_fast.monitor.runs import MARKS, STAGES, Run, Stage, read_run
from rlhf_fast.monitor.texts import extremes, held_out, level_words, token_samples
from rlhf_fast.text import printable

GENERATOR = '<meta name="generator" content="rlhf-fast">'  # marks a page that we may write over
SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "report.js")


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


def write_report(run_folder: Path) -> Path:
    """Write ``run_folder/report.html`` (atomically) and return its path.

    Args:
        run_folder: the folder of a run, with some of ``sft/``, ``reward/``, ``dpo/`` and ``ppo/`` in it, or the folder
            of a stage, with ``metrics.jsonl`` in it.

    Raises:
        UserError: the folder contains no run; a file in it is broken; the page cannot be written.
    """
    return write_page([Path(run_folder)], Path(run_folder) / "report.html")


def write_page(folders: Sequence[Path], path: Path, *, reload: bool = False) -> Path:
    """Write the page of one run, or of several beside each other, to ``path``; returns ``path``.

    Args:
        reload: the page reloads itself every few seconds, while somebody writes it again and again.

    Raises:
        UserError: as in :func:`write_report`; more than six folders.
    """
    if len(folders) > len(MARKS):
        raise UserError(f"expected at most {len(MARKS)} runs to compare, got {len(folders)}: name fewer")
    if len(folders) == 1:
        text = _page_of_one(read_run(folders[0]), reload)
    else:
        runs = [read_run(folder, mark) for folder, mark in zip(folders, MARKS, strict=False)]
        text = _page_of_several(runs, reload)
    write_atomic(path, text)
    return path


def _page_of_one(run: Run, reload: bool) -> str:
    panels = {stage.name: stage_panels([stage]) for stage in run.stages}
    links = {name: metric_links(found) for name, found in panels.items()}
    return _render(
        title=run.name,
        runs=[],
        sentences=sentences(run),
        verdicts=list(verdict_list(run.stages, links)),
        stages=[_section([stage], panels[stage.name]) | _samples(stage) for stage in run.stages],
        settings=run.settings,
        reload=reload,
    )


def _page_of_several(runs: Sequence[Run], reload: bool) -> str:
    sections, links = [], {}
    for name in STAGES:
        stages = [stage for run in runs for stage in run.stages if stage.name == name]
        if stages:
            panels = stage_panels(stages)
            links[name] = metric_links(panels)
            sections.append(_section(stages, panels))
    return _render(
        title=", ".join(run.name for run in runs),
        runs=[{"mark": run.mark, "name": run.name, "folder": run.folder, "said": sentences(run)[0]} for run in runs],
        verdicts=list(verdict_list([stage for run in runs for stage in run.stages], links)),
        stages=sections,
        differing=settings_that_differ(runs),
        reload=reload,
    )


def _section(stages: Sequence[Stage], panels: Sequence[Panel]) -> dict[str, Any]:
    name = stages[0].name
    last = max((stage.last_step for stage in stages if stage.last_step is not None), default=None)
    beside = {"marks": [stage.mark for stage in stages], "rows": figures_beside(stages)} if stages[0].mark else None
    return {
        "id": name,
        "title": STAGES[name],
        "last_step": "" if last is None else f"{last:,}",
        "figures": [] if beside else list(read_figures(stages[0].figures).values()),
        "beside": beside,
        "panels": panels,
    }


def _samples(stage: Stage) -> dict[str, Any]:
    return {"held_out": held_out(stage), "extremes": extremes(stage), "tokens": token_samples(stage)}


def _render(*, stages: Sequence[dict[str, Any]], **values: Any) -> str:
    drawings = [drawing for stage in stages for panel in stage["panels"] for drawing in panel.drawings]
    return PAGES.get_template("report.html.jinja").render(
        generator=Markup(GENERATOR),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        scripts=[script for script, _ in _scripts()],
        hashes=" ".join(f"'sha256-{digest}'" for _, digest in _scripts()),
        data=as_data({drawing.id: drawing.data for drawing in drawings}),
        stages=stages,
        levels=level_words(),
        **values,
    )


def as_data(value: Any) -> Markup:
    """JSON for a <script type="application/json">: no text in it can end the script, and none is raw markup."""
    text = json.dumps(_printable(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _printable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


@cache
def _scripts() -> list[tuple[Markup, str]]:
    """The page's scripts, each with the base64 of its SHA-256, by which the Content-Security-Policy allows it."""
    page = files("rlhf_fast.monitor") / "page"
    texts = [(page / name).read_text(encoding="utf-8").strip() for name in SCRIPTS]
    return [(Markup(text), base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()) for text in texts]
