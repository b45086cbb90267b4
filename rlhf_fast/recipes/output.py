"""Opening a stage's output folder: new, to be gone on with, or another run's."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rlhf_fast import checkpoint
from rlhf_fast.config import StageConfig
from rlhf_fast.errors import UserError

# What a stage writes; --overwrite_output_dir deletes these names and nothing else.
WRITTEN = ("metrics.jsonl", "samples.jsonl", "summary.json", "config.yaml", "report.html")
FOLDERS = ("adapter", "best", "policy", "critic", "runs")


def open_output(config: StageConfig, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, or None for a run from its first step.

    Raises UserError where the folder holds another run and neither resuming nor overwriting was asked for, or where
    the named checkpoint is not there.
    """
    check_output(config)
    folder = Path(config.output_dir)
    wanted = config.resume_from_checkpoint
    if wanted == "auto":
        found = checkpoint.newest(folder, say)
        if found is None and _holds_run(folder):
            say(f"{folder} has no whole checkpoint yet: starting from the first step")
            clear(folder)
        return found
    if wanted is not None:
        path = Path(wanted)
        if not path.is_dir():
            there = ", ".join(str(p) for p in checkpoint.list_checkpoints(folder)) or "none"
            raise UserError(f"--resume_from_checkpoint: no folder {wanted}; checkpoints of {folder}: {there}")
        if path.resolve().parent != folder.resolve():
            raise UserError(
                f"--resume_from_checkpoint {wanted} is not in --output_dir {folder}; set --output_dir to the "
                "folder of the run that goes on"
            )
        return path
    clear(folder)
    return None


def check_output(config: StageConfig) -> None:
    """Raises UserError where ``open_output`` would, without touching anything."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        reason = "no permission to write in" if there.is_dir() else "a folder cannot be made under the file"
        raise UserError(f"--output_dir {folder}: {reason} {there}; name another folder")
    if config.resume_from_checkpoint is not None and config.overwrite_output_dir:
        raise UserError("--resume_from_checkpoint and --overwrite_output_dir contradict each other; set one of them")
    if config.resume_from_checkpoint is None and not config.overwrite_output_dir and _holds_run(folder):
        raise UserError(
            f"{folder} holds another run: go on with it (--resume_from_checkpoint auto), delete it "
            "(--overwrite_output_dir true), or name another --output_dir"
        )


def clear(folder: Path) -> None:
    """Deletes an earlier run's files, and nothing that a stage does not write."""
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    for path in [folder / name for name in FOLDERS] + list(folder.glob("checkpoint-*")):
        if path.is_dir():
            shutil.rmtree(path)


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in WRITTEN[:3]) or bool(checkpoint.list_checkpoints(folder))
