"""Reads what a run has written so far, for the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_fast.config_yaml import read_yaml
from rlhf_fast.errors import UserError
from rlhf_fast.metrics import stage_of
from rlhf_fast.monitor.log import read_steps
from rlhf_fast.monitor.summary import read_summary
from rlhf_fast.monitor.verdict import FILE, Verdict, read_verdicts

STAGES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "dpo": "DPO", "ppo": "PPO"}
MARKS = "ABCDEF"  # of runs beside each other; the style sheet has as many colours and shapes
READ = ("metrics.jsonl", "samples.jsonl", "summary.json", FILE)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """The files that one stage has written so far.

    Attributes:
        mark: the letter of its run beside others, empty for a run on its own.
        verdicts: None if the run has not looked for failures yet.
    """

    name: str
    metrics: Sequence[Row]
    samples: Sequence[Row] = ()
    summary: Row = field(default_factory=dict)
    verdicts: Sequence[Verdict] | None = None
    mark: str = ""

    @property
    def place(self) -> int:
        """The number of its run beside others, from 0."""
        return MARKS.index(self.mark) if self.mark else 0

    @property
    def figures(self) -> Row:
        return self.summary.get("figures") or {}

    @property
    def last_step(self) -> int | None:
        return max((row["step"] for row in self.metrics), default=None)


@dataclass(frozen=True)
class Run:
    """The files of a run; ``mark`` is its letter beside others, ``settings`` the text of its settings file."""

    folder: Path
    stages: Sequence[Stage]
    settings: str | None
    mark: str = ""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def config(self) -> Row:
        """Its settings; those of a single stage under the stage's name. UserError if the file is not valid YAML."""
        config = _config(self.folder)
        return {self.stages[0].name: config} if None in stage_folders(self.folder) else config


def stage_folders(folder: Path) -> dict[str | None, Path]:
    """The folders with metrics: of one stage whose name is not known yet (None), or of the stages of a run."""
    if (folder / "metrics.jsonl").exists():
        return {None: folder}
    return {name: folder / name for name in STAGES if (folder / name / "metrics.jsonl").exists()}


def settings_file(folder: Path) -> Path:
    resolved = folder / "config.resolved.yaml"  # exists if config.yaml is the user's file
    return resolved if resolved.exists() else folder / "config.yaml"


def _config(folder: Path) -> Row:
    path = settings_file(folder)
    return read_yaml(str(path)) if path.exists() else {}


def has_ended(folder: Path) -> bool:
    """The last stage that the settings of the run in ``folder`` name has its figures."""
    folders = stage_folders(folder)
    if None in folders:
        return (folder / "summary.json").exists()
    planned = _config(folder).get("stages")
    last = folder / str(planned[-1]) if isinstance(planned, list) and planned else [*folders.values()][-1]
    return (last / "summary.json").exists()


def read_run(folder: Path, mark: str = "") -> Run:
    """The run in ``folder``: a whole run, or one stage.

    Raises:
        UserError: the folder contains no run, or a file in it is broken.
    """
    folders = stage_folders(folder)
    if not folders:
        names = ", ".join(f"{name}/metrics.jsonl" for name in STAGES)
        raise UserError(
            f"expected {folder} to hold metrics.jsonl or one of {names}; it holds none: give the output folder of a run"
        )
    path = settings_file(folder)
    settings = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    return Run(folder, [_read_stage(path, name, mark) for name, path in folders.items()], settings, mark)


def _read_stage(folder: Path, name: str | None, mark: str) -> Stage:
    metrics = read_steps(folder / "metrics.jsonl")
    samples = folder / "samples.jsonl"
    summary = read_summary(folder) or {}
    # a single stage has no summary.json until it ends; its metrics show which stage it is
    name = name or summary.get("stage") or stage_of({key for row in metrics for key in row})
    if name not in STAGES:
        raise UserError(f"{folder / 'summary.json'}: expected stage to be one of {', '.join(STAGES)}, got {name!r}")
    return Stage(
        name,
        metrics,
        read_steps(samples) if samples.exists() else [],
        summary,
        read_verdicts(folder) if (folder / FILE).exists() else None,
        mark,
    )
