"""An output folder: new, to be gone on with, or another's. A run notes what it makes and touches nothing else.

The note is ``.rlhf-fast.json`` in the folder: the names that runs have made there. They alone are ever replaced, or
deleted by --overwrite_output_dir, with the checkpoints that hold our manifest.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import rlhf_fast
from rlhf_fast import checkpoint
from rlhf_fast.config import RunConfig, StageConfig
from rlhf_fast.config_yaml import read_yaml
from rlhf_fast.errors import UserError
from rlhf_fast.files import write_atomic
from rlhf_fast.recipes import lock
from rlhf_fast.text import one_line, shown

MARKER = ".rlhf-fast.json"
CONFIG, RESOLVED, REPORT, ERROR = "config.yaml", "config.resolved.yaml", "report.html", "error.txt"
RECORDS = ("metrics.jsonl", "samples.jsonl", "summary.json")  # a folder with one of them holds a run
ADAPTERS = ("adapter", "best", "policy", "critic")
NAMES = {CONFIG, RESOLVED, REPORT, ERROR, *RECORDS, *ADAPTERS, "runs"}
WHOLE_RUN = "run"
SETTINGS_OF_A_RUN = 30  # a config.yaml with as many is one that a run wrote: people write a few


class OutputFolder:
    """What runs have made in a folder.

    Attributes:
        kind: "sft", "reward" or "ppo", "run" for the folder above them, "" where no run has been.
        record: the name under which the settings are written: not that of the --config file.
    """

    def __init__(self, path: Path, config_file: str = "") -> None:
        self.path = path
        self.kind, self._made = _read_marker(path)
        self._given = os.path.realpath(config_file) if config_file else ""
        self.record = RESOLVED if self._is_given(CONFIG) else CONFIG
        self._lock: lock.FolderLock | None = None

    def _is_given(self, name: str) -> bool:
        return bool(self._given) and os.path.realpath(self.path / name) == self._given

    def holds_run(self) -> list[str]:
        """What a run has left here that nobody wants to lose by accident: records, checkpoints, adapters."""
        return sorted(name for name in self._there() if name in RECORDS + ADAPTERS or checkpoint.step_of(name) >= 0)

    def finished(self) -> bool:
        return "summary.json" in self._there()

    def _there(self) -> set[str]:
        """Names of ours that are here. A link is never ours."""
        found = {name for name in self._made if os.path.lexists(self.path / name)}
        found |= {path.name for path in checkpoint.list_checkpoints(self.path) if checkpoint.is_ours(path)}
        return {name for name in found if not (self.path / name).is_symlink() and not self._is_given(name)}

    def check_way(self, names: Iterable[str], *, linked: bool = False) -> None:
        """Raises UserError where something that no run made has one of ``names``. ``linked``: records and checkpoints
        that a run made may since lie elsewhere, with a link here; they are gone on with."""
        strange = [part for name in names for part in self._strangers(name, linked)]
        if strange:
            raise UserError(
                f"{self.path} holds {', '.join(map(shown, sorted(strange)[:8]))}, which no run made there and this run "
                "would replace: move it away, or name another --output_dir"
            )

    def _strangers(self, name: str, linked: bool) -> list[str]:
        if name in self._made:
            link = (self.path / name).is_symlink() and not (linked and name not in ADAPTERS)
            return [name] if link and not self._is_given(name) else []
        if self._is_given(name) or checkpoint.step_of(name) >= 0 and checkpoint.is_ours(self.path / name):
            return []
        return [part for part in (name, *_unfinished(name)) if os.path.lexists(self.path / part)]

    def open(self, kind: str, say: Callable[[str], None]) -> None:
        """Makes the folder, locks it and notes whose it is."""
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock.hold(self.path, say)
        made = _read_marker(self.path)[1]  # again: nobody else can change it from here on
        self.kind, self._made = kind, {name for name in made if os.path.lexists(self.path / name)}
        self._note()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def claim(self, name: str) -> Path:
        """The path of ``name``, which the run is about to write. UserError where it is somebody else's."""
        if name not in self._made:
            self.check_way({name})
            self._made.add(name)
            self._note()
        return self.path / name

    def made(self, name: str) -> bool:
        return name in self._made

    def clear(self) -> None:
        """Deletes what runs have made here."""
        for name in self._there():
            with _writing(self.path / name):
                for part in (name, *_unfinished(name)):
                    _delete(self.path / part)
        self._made = {name for name in self._made if os.path.lexists(self.path / name)}
        self._note()

    def remove(self, name: str) -> None:
        """Deletes one file that runs have made here, if it is there."""
        if name in self._there():
            with _writing(self.path / name):
                (self.path / name).unlink()

    def _note(self) -> None:
        note = {"made_by": f"rlhf-fast {rlhf_fast.__version__}", "kind": self.kind, "names": sorted(self._made)}
        write_atomic(self.path / MARKER, json.dumps(note, indent=1))


def open_output(config: StageConfig, kind: str, say: Callable[[str], None]) -> tuple[OutputFolder, Path | None]:
    """The folder, locked, and the checkpoint to go on from, or None for a run from its first step.

    Raises UserError where the folder holds another run and neither resuming nor overwriting was asked for, where it
    holds what no run made and this one would replace, or where the named checkpoint is not there.
    """
    check_output(config)
    output = OutputFolder(Path(config.output_dir), config.config_file)
    resumed = None if config.resume_from_checkpoint in (None, "auto") else _named_checkpoint(config)
    output.open(kind, say)
    if config.resume_from_checkpoint == "auto":
        resumed = checkpoint.newest(output.path, say)
        if resumed is None and output.finished():
            raise UserError(
                f"{output.path} holds a finished run and no whole checkpoint to go on from; name another --output_dir, "
                "or start again in this one (--overwrite_output_dir true)"
            )
        if resumed is None and output.holds_run():
            say(f"{output.path} has no whole checkpoint yet: starting from the first step")
    if resumed is None:
        output.clear()
    output.remove(ERROR)  # of the run before
    return output, resumed


def _named_checkpoint(config: StageConfig) -> Path:
    folder, wanted = Path(config.output_dir), str(config.resume_from_checkpoint)
    if not os.path.isdir(wanted):
        there = ", ".join(str(p) for p in checkpoint.list_checkpoints(folder)) or "none"
        raise UserError(
            f"--resume_from_checkpoint: no folder {one_line(wanted, 200)}; checkpoints of {folder}: {there}"
        )
    if Path(wanted).resolve().parent != folder.resolve():
        raise UserError(
            f"--resume_from_checkpoint {wanted} is not in --output_dir {folder}; set --output_dir to the "
            "folder of the run that goes on"
        )
    return Path(wanted)


def check_output(config: StageConfig) -> None:
    """Raises UserError where ``open_output`` would, without touching anything."""
    folder = Path(config.output_dir)
    check_place(folder)
    if config.resume_from_checkpoint is not None and config.overwrite_output_dir:
        raise UserError("--resume_from_checkpoint and --overwrite_output_dir contradict each other; set one of them")
    lock.check_free(folder)
    output = OutputFolder(folder, config.config_file)
    held = output.holds_run()
    if held and config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        raise UserError(
            f"{folder} holds another run ({', '.join(held[:4])}): go on with it (--resume_from_checkpoint auto), "
            "delete it (--overwrite_output_dir true), or name another --output_dir"
        )
    output.check_way([*NAMES, *_checkpoint_names(folder)], linked=config.resume_from_checkpoint is not None)
    _check_inputs(config, folder)


def _checkpoint_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    try:
        return [name for name in os.listdir(folder) if checkpoint.step_of(name) >= 0]
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}; name another folder") from None


def check_run_output(config: RunConfig) -> OutputFolder:
    """As ``check_output``, for the folder above the stages'; it is not opened yet."""
    folder = Path(config.output_dir)
    check_place(folder)
    lock.check_free(folder)
    output = OutputFolder(folder, config.config_file)
    output.check_way({CONFIG, RESOLVED, REPORT})
    return output


def check_place(folder: Path) -> None:
    """Raises UserError where ``folder`` is not a folder that can be made or written in."""
    name = shown(str(folder))[1:-1]
    try:
        str(folder).encode()
        os.stat(folder)
    except UnicodeEncodeError:
        raise UserError(f"--output_dir {name}: its name is not UTF-8 text; name another folder") from None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"--output_dir {name}: {error.strerror}; name another folder") from None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {name} is a file; name a folder")
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if there.is_symlink() and not there.exists():
        where = shown(os.readlink(there))
        raise UserError(f"--output_dir {name}: {there} is a link to {where}, which is not there; name another folder")
    if not (there.is_dir() and os.access(there, os.W_OK)):
        reason = "no permission to write in" if there.is_dir() else "a folder cannot be made under the file"
        raise UserError(f"--output_dir {name}: {reason} {there}; name another folder")


def _check_inputs(config: StageConfig, folder: Path) -> None:
    """Nothing that the run reads may be something that it replaces or deletes."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if not item.metadata["path"] or item.name in ("output_dir", "resume_from_checkpoint") or not value:
            continue
        for name in value if isinstance(value, list) else [value]:
            path = name.rpartition(":")[0] if ".py:" in name else name
            if not os.path.exists(path):
                continue
            inside = os.path.relpath(os.path.realpath(path), os.path.realpath(folder)).split(os.sep)[0]
            if inside in NAMES or checkpoint.step_of(inside) >= 0:
                raise UserError(
                    f"--{item.name} {name} is among what a run in {folder} replaces ({inside}): name another "
                    "--output_dir, or move it away"
                )


def _read_marker(folder: Path) -> tuple[str, set[str]]:
    """Kind and names; of a folder without a marker, what a run before there were markers surely made."""
    try:
        note = json.loads((folder / MARKER).read_bytes()[:1_000_000])
        names = {name for name in note["names"] if name in NAMES or checkpoint.step_of(name) >= 0}
        return str(note["kind"]), names
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return _unmarked_run(folder)


def _unmarked_run(folder: Path) -> tuple[str, set[str]]:
    settings = _settings(folder / CONFIG)
    stages = {name: section for name, section in settings.items() if isinstance(section, dict)}
    if "stages" in settings and any(len(section) >= SETTINGS_OF_A_RUN for section in stages.values()):
        return WHOLE_RUN, {CONFIG} | ({REPORT} if _starts_with(folder / REPORT, b"<!DOCTYPE html>") else set())
    begun = (folder / "metrics.jsonl").is_file() or any(map(checkpoint.is_ours, checkpoint.list_checkpoints(folder)))
    if len(settings) < SETTINGS_OF_A_RUN or not begun:
        return "", set()
    names = {name for name in (CONFIG, REPORT, *RECORDS) if (folder / name).is_file()}
    names |= {name for name in ADAPTERS if (folder / name / "adapter_config.json").is_file()}
    names |= {"runs"} if next((folder / "runs").rglob("events.out.tfevents*"), None) else set()
    return "", names | {path.name for path in checkpoint.list_checkpoints(folder)}


def _settings(path: Path) -> dict[str, Any]:
    """What ``dump_yaml`` wrote; empty for anything else."""
    if not (_starts_with(path, b"model_name_or_path:") or _starts_with(path, b"output_dir:")):
        return {}
    try:
        return read_yaml(str(path))
    except UserError:  # broken since, so nobody can say that it is a run's
        return {}


def _starts_with(path: Path, beginning: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


def _unfinished(name: str) -> tuple[str, ...]:
    """Names under which ``name`` is written, until it is whole."""
    return f"{name}.writing", f"{name}.replaced", f".{name}.tmp"


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot change {path}: {error.strerror}; mend that, or name another --output_dir") from error
