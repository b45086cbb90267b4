"""Responses that trainers write beside their metrics, in the form of our samples.jsonl."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.monitor.log import read_lines

TEXTS = ("response", "output", "completion")  # a line with one of these is a sample: ours, verl's, TRL's
OTHER_NAMES = {"input": "prompt", "output": "response", "completion": "response"}
OURS = {"step", "split", "prompt", "response", "score", "advantage"}


def sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row under our keys: ``step``, ``split``, ``prompt``, ``response``, ``score`` and, under ``extra``, the numbers
    and texts that have no counterpart. Our own rows come back as they are.

    TRL names a column for each reward function: where there is one, it is the score.
    """
    if "response" in row:
        return dict(row)
    found = {OTHER_NAMES.get(name, name): value for name, value in row.items()}
    others = {name: value for name, value in found.items() if name not in OURS and isinstance(value, str | int | float)}
    numbers = [value for value in others.values() if not isinstance(value, str | bool)]
    if "score" not in found and len(numbers) == 1:
        found["score"] = numbers[0]
    kept = {name: value for name, value in found.items() if name in OURS}
    return {"split": "train", **kept, **({"extra": others} if others else {})}


def parquet_samples(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of TRL's ``log_completions``, which writes a file for each logged step.

    Raises:
        UserError: a file is no parquet, or has no completions.
    """
    import pyarrow
    import pyarrow.parquet

    samples = []
    for path in paths:
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: expected the parquet of TRL's log_completions: {error}") from error
        if rows and not {"step", "completion"} <= set(rows[0]):
            raise UserError(f"{path}: expected the columns step, prompt and completion; got {', '.join(rows[0])}")
        samples += [sample(row) for row in rows]
    return samples


def dumped_samples(folder: Path) -> list[dict[str, Any]]:
    """The files ``STEP.jsonl`` of verl's ``rollout_data_dir`` or ``validation_data_dir``, in order."""
    files = {int(path.stem): path for path in folder.glob("*.jsonl") if path.stem.isdecimal()}
    return [sample({"step": step, **row}) for step in sorted(files) for row in read_lines(files[step])]
