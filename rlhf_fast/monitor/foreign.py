"""Reads the logs of a run, ours or those of TRL, verl and OpenRLHF, as rows under our metric names."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_fast.config import STAGES
from rlhf_fast.errors import UserError
from rlhf_fast.folders import EVENTS
from rlhf_fast.monitor.foreign_names import OURS, finite, kind_of, renamed
from rlhf_fast.monitor.foreign_samples import TEXTS, dumped_samples, parquet_samples, sample
from rlhf_fast.monitor.foreign_text import console_steps, csv_steps
from rlhf_fast.monitor.log import read_lines
from rlhf_fast.text import shown

LAST_FIRST = tuple(STAGES)[::-1]
# Where a line has its step, the best first: wandb's own _step counts calls of its log function.
STEPS = ("step", "train/global_step", "training/global_step", "global_step", "trainer/global_step", "_step", "Step")
READABLE = (
    "a run or stage folder, metrics.jsonl, trainer_state.json or a folder with checkpoints, TensorBoard's event files, "
    "a CSV or JSONL export, or a console log of verl or OpenRLHF"
)
Steps = Iterable[tuple[int, Mapping[str, Any]]]  # step, and the metrics that were logged at it


@dataclass(frozen=True)
class Log:
    """A run's log.

    Attributes:
        kind: the trainer: ``rlhf-fast``, ``trl``, ``verl`` or ``openrlhf``.
        path: what was read: a file, or a folder of event files.
        rows: one a step, in order: ``{"step": int, metric name: float}``. A metric that was not logged at the step, or
            was not finite there, is missing. Of steps that were logged twice (a resumed run) the later values stand.
        samples: responses in the form of samples.jsonl, in the order of the log; empty where it has none.
    """

    kind: str
    path: Path
    rows: list[dict[str, float]]
    samples: list[dict[str, Any]] = field(default_factory=list)


def read_log(path: str | Path) -> Log:
    """Reads a run's log, also while the run writes it.

    Args:
        path: our run folder (its last stage that has begun), stage folder, metrics.jsonl or samples.jsonl;
            transformers' trainer_state.json, or a folder with one in it or in its checkpoint-N folders (the newest);
            event files of TensorBoard or their folder; a CSV or JSONL export of wandb; JSONL of verl's file logger;
            the console output of verl or OpenRLHF; parquet of TRL's ``log_completions``; a folder of verl's
            ``rollout_data_dir`` or ``validation_data_dir``.

    Raises:
        UserError: there is no such file, or it cannot be read; says what was expected and what came.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; expected {READABLE}")
    if EVENTS.fullmatch(path.name):
        return _log(path, _events(path))
    if path.suffix == ".parquet":
        return Log("trl", path, [], parquet_samples([path]))
    if path.suffix == ".csv":
        return _log(path, csv_steps(path, STEPS))
    if path.suffix == ".json":
        return _read_state(path)
    if path.suffix == ".jsonl" or _begins_with_json(path):
        return _read_jsonl(path)
    return _log(path, console_steps(path))


def _read_folder(folder: Path) -> Log:
    for metrics in (folder / "metrics.jsonl", *(folder / stage / "metrics.jsonl" for stage in LAST_FIRST)):
        if metrics.exists():
            return _read_jsonl(metrics)
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if _numbered(path)}
    newest = [checkpoints[step] for step in sorted(checkpoints, reverse=True)]
    for state in (path / "trainer_state.json" for path in (folder, *newest)):
        if state.exists():
            return _read_state(state)
    events = sorted({path.parent for path in folder.rglob("events.out.tfevents.*")})
    if len(events) > 1:
        names = ", ".join(str(path) for path in events[:5])
        raise UserError(
            f"{folder}: expected the event files of one run, got those of {len(events)}: give one of {names}"
        )
    if events:
        return _log(events[0], _events(events[0]))
    if list(folder.glob("*.parquet")):
        return Log("trl", folder, [], parquet_samples(sorted(folder.glob("*.parquet"))))
    samples = dumped_samples(folder)
    if samples:
        return Log("verl", folder, [], samples)
    raise UserError(f"{folder}: expected {READABLE}; found none of these in it")


def _numbered(path: Path) -> bool:
    return path.name.rpartition("-")[2].isdecimal()


def _log(path: Path, steps: Steps, samples: list[dict[str, Any]] | None = None) -> Log:
    merged: dict[int, dict[str, float]] = {}
    for step, values in steps:
        merged.setdefault(step, {}).update((name, value) for name, value in finite(values).items() if _is_metric(name))
    kind = kind_of({name.removeprefix("train/") for values in merged.values() for name in values})
    rows: list[dict[str, float]] = [{"step": step, **renamed(kind, merged[step])} for step in sorted(merged)]
    return Log(kind, path, rows, samples or [])


def _is_metric(name: str) -> bool:
    return name not in STEPS and not name.startswith("_") and not name.endswith("/global_step")


def _begins_with_json(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return re.match(rb'\s*\{\s*"', file.read(1000)) is not None
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Log:
    """Lines of metrics (ours, verl's ``{"step", "data"}``, wandb's history) or of samples."""
    lines = read_lines(path)
    samples = [sample(line) for line in lines if any(isinstance(line.get(key), str) for key in TEXTS)]
    if not samples and (path.parent / "samples.jsonl").exists():
        samples = [sample(line) for line in read_lines(path.parent / "samples.jsonl")]
    return _log(path, _line_steps(path, lines), samples)


def _line_steps(path: Path, lines: list[dict[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    key = next((name for name in STEPS if any(_is_step(line.get(name)) for line in lines)), None)
    if key is None and lines:
        raise UserError(f'{path}: expected a whole number under "step" or "_step" in its lines, got {shown(lines[0])}')
    step = 0  # a line without one, such as wandb's of system figures, belongs to the step before
    for line in lines:
        if key is not None and _is_step(line.get(key)):
            step = int(line[key])
        if any(isinstance(line.get(text), str) for text in TEXTS):
            continue
        yield step, line["data"] if isinstance(line.get("data"), dict) else line


def _is_step(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value == int(value)
    )


def _read_state(path: Path) -> Log:
    """``log_history`` of transformers, and the completions that TRL wrote beside it."""
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected trainer_state.json of transformers, got no whole JSON text ({error})"
        ) from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(line, dict) for line in history):
        raise UserError(f'{path}: expected a list "log_history", as in trainer_state.json; got {shown(state)}')
    output = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    completions = sorted((output / "completions").glob("*.parquet"))
    log = _log(path, _line_steps(path, history), parquet_samples(completions) if completions else [])
    return Log("trl" if log.kind == OURS else log.kind, log.path, log.rows, log.samples)


def _events(path: Path) -> Iterator[tuple[int, Mapping[str, float]]]:
    """The scalars of an event file, or of the event files in a folder."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
    except ImportError as error:
        raise UserError(f"{path}: event files need TensorBoard's reader: pip install tensorboard") from error
    events = EventAccumulator(str(path), size_guidance={SCALARS: 0}).Reload()  # 0: all of them
    for name in events.Tags()[SCALARS]:
        for event in events.Scalars(name):
            yield event.step, {name: event.value}
