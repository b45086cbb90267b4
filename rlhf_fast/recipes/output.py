"""The output folder of a run. A run records the files that it creates, and never changes any others.

The record is ``.rlhf-fast.json`` in the folder, the "marker": the names that runs have created there. Only these files,
and checkpoints with a valid manifest, are ever replaced, or deleted by --overwrite_output_dir.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import rlhf_fast
from rlhf_fast import checkpoint, folders
from rlhf_fast.config import STAGES, RunConfig, StageConfig
from rlhf_fast.config_yaml import read_yaml
from rlhf_fast.errors import UserError
from rlhf_fast.files import write_atomic
from rlhf_fast.monitor.verdict import FILE as VERDICTS
from rlhf_fast.recipes import lock
from rlhf_fast.text import one_line, shown

MARKER = ".rlhf-fast.json"
CONFIG, RESOLVED, REPORT, ERROR = "config.yaml", "config.resolved.yaml", "report.html", "error.txt"
RECORDS = ("metrics.jsonl", "samples.jsonl", "summary.json")  # a folder with one of these contains a run
ADAPTERS = ("adapter", "best", "policy", "critic")
NAMES = {CONFIG, RESOLVED, REPORT, ERROR, VERDICTS, *RECORDS, *ADAPTERS, "runs"}
WHOLE_RUN = "run"
SETTINGS_OF_A_RUN = 30  # a config.yaml with this many settings was written by a run; users write only a few


class OutputFolder:
    """An output folder, and the names that runs have created in it.

    Attributes:
        kind: "sft", "reward", "dpo" or "ppo", "run" for the folder above them, "" if no run was there.
        record: the file name for the resolved settings, which must not overwrite the --config file.
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
        """Names of a run's valuable files here: records, checkpoints, adapters."""
        return sorted(name for name in self._there() if name in RECORDS + ADAPTERS or checkpoint.step_of(name) >= 0)

    def finished(self) -> bool:
        return "summary.json" in self._there()

    def _there(self) -> set[str]:
        """The names that runs have created and that still exist. A symbolic link is never one of them."""
        found = {name for name in self._made if os.path.lexists(self.path / name)}
        found |= {path.name for path in checkpoint.list_checkpoints(self.path) if checkpoint.is_ours(path)}
        return {name for name in found if not (self.path / name).is_symlink() and not self._is_given(name)}

    def check_way(self, names: Iterable[str], *, linked: bool = False) -> None:
        """Raises UserError if a file that no run created has one of ``names``. ``linked``: allows links in place of
        records and checkpoints that a run created, which the user may have moved elsewhere."""
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
        """Creates the folder, locks it and writes its marker."""
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock.hold(self.path, say)
        made = _read_marker(self.path)[1]  # read again under the lock
        self.kind, self._made = kind, {name for name in made if os.path.lexists(self.path / name)}
        self._note()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def claim(self, name: str) -> Path:
        """Records that the run creates ``name``, and returns its path. UserError if a file of that name exists that no
        run created."""
        if name not in self._made:
            self.check_way({name})
            self._made.add(name)
            self._note()
        return self.path / name

    def made(self, name: str) -> bool:
        return name in self._made

    def clear(self) -> None:
        """Deletes everything that runs have created here. Other files inside their folders stay."""
        for name in self._there():
            with _writing(self.path / name):
                for part in (name, *_unfinished(name)):
                    _delete(self.path / part)
        self._made = {name for name in self._made if os.path.lexists(self.path / name)}
        self._note()

    def remove(self, name: str) -> None:
        """Deletes one file that runs have created here, if it exists."""
        if name in self._there():
            with _writing(self.path / name):
                (self.path / name).unlink()

    def _note(self) -> None:
        note = {"made_by": f"rlhf-fast {rlhf_fast.__version__}", "kind": self.kind, "names": sorted(self._made)}
        write_atomic(self.path / MARKER, json.dumps(note, indent=1))


def open_output(config: StageConfig, kind: str, say: Callable[[str], None]) -> tuple[OutputFolder, Path | None]:
    """The locked folder, and the checkpoint to resume from, or None for a run from its first step.

    Raises UserError if the folder contains another run and neither resuming nor overwriting was requested, if the run
    would replace files that no run created, or if the named checkpoint does not exist.
    """
    check_output(config, kind)
    output = OutputFolder(Path(config.output_dir), config.config_file)
    resumed = None if config.resume_from_checkpoint in (None, "auto") else _named_checkpoint(config)
    output.open(kind, say)
    if config.resume_from_checkpoint == "auto":
        resumed = checkpoint.newest(output.path, say)
        damaged = (
            []
            if resumed
            else [
                path.name
                for path in checkpoint.list_checkpoints(output.path)
                if any((path / name).exists() for name in (checkpoint.MANIFEST, checkpoint.TENSORS, checkpoint.VALUES))
            ]
        )
        if damaged:
            raise UserError(
                f"{output.path} holds checkpoints and none is whole ({', '.join(damaged[-4:])}): bring one back from a "
                "copy, start again in this folder (--overwrite_output_dir true), or name another --output_dir"
            )
        if resumed is None and output.finished():
            raise UserError(
                f"{output.path} holds a finished run and no whole checkpoint to go on from; name another --output_dir, "
                "or start again in this one (--overwrite_output_dir true)"
            )
        if resumed is None and output.holds_run():
            say(f"{output.path} has no whole checkpoint yet: starting from the first step")
    if resumed is None:
        output.clear()
    output.remove(ERROR)  # from the previous run
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


def check_output(config: StageConfig, kind: str) -> None:
    """Raises UserError if ``open_output`` would, without changing any files."""
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
    if not config.overwrite_output_dir:
        _check_kind(output, kind)
    output.check_way([*NAMES, *_checkpoint_names(folder)], linked=config.resume_from_checkpoint is not None)
    _check_inputs(config, folder)


def _check_kind(output: OutputFolder, kind: str) -> None:
    if output.kind in (*STAGES, WHOLE_RUN) and output.kind != kind:
        raise UserError(
            f"{output.path} is the folder of `rlhf-fast {output.kind}`, and this is `rlhf-fast {kind}`: name another "
            "--output_dir"
        )


def _checkpoint_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    try:
        return [name for name in os.listdir(folder) if checkpoint.step_of(name) >= 0]
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}; name another folder") from None


def check_run_output(config: RunConfig) -> OutputFolder:
    """Like ``check_output``, for the folder above the stages'. Returns it without opening it."""
    folder = Path(config.output_dir)
    check_place(folder)
    lock.check_free(folder)
    output = OutputFolder(folder, config.config_file)
    _check_kind(output, WHOLE_RUN)
    output.check_way({CONFIG, RESOLVED, REPORT})
    return output


def check_place(folder: Path) -> None:
    """Raises UserError if ``folder`` cannot be created or written to."""
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
    for path in (folder / MARKER, folder / lock.LOCK):
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise UserError(f"{path} is no plain file, and runs keep a file of that name: move it away")
    for path in (Path(os.path.realpath(folder)), *Path(os.path.realpath(folder)).parents):
        if (path.parent / MARKER).is_file() and OutputFolder(path.parent).made(path.name):
            raise UserError(
                f"--output_dir {name} is in {path}, which a run made and may replace or delete: name another folder"
            )
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if there.is_symlink() and not there.exists():
        where = shown(os.readlink(there))
        raise UserError(f"--output_dir {name}: {there} is a link to {where}, which is not there; name another folder")
    if not (there.is_dir() and os.access(there, os.W_OK)):
        reason = "no permission to write in" if there.is_dir() else "a folder cannot be made under the file"
        raise UserError(f"--output_dir {name}: {reason} {there}; name another folder")


def _check_inputs(config: StageConfig, folder: Path) -> None:
    """Raises UserError if an input of the run is a file that the run would replace or delete."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if not item.metadata["path"] or item.name in ("output_dir", "resume_from_checkpoint") or not value:
            continue
        for name in value if isinstance(value, list) else [value]:
            path = name.rpartition(":")[0] if ".py:" in name else name
            if not os.path.exists(path):
                continue
            inside = os.path.relpath(os.path.realpath(path), os.path.realpath(folder)).split(os.sep)[0]
            if inside == os.curdir and "dataset" in item.name:
                raise UserError(f"--{item.name} {name} is --output_dir itself: name another --output_dir")
            if inside in NAMES or checkpoint.step_of(inside) >= 0:
                raise UserError(
                    f"--{item.name} {name} is among what a run in {folder} replaces ({inside}): name another "
                    "--output_dir, or move it away"
                )


def _read_marker(folder: Path) -> tuple[str, set[str]]:
    """Kind and names from the marker; without a marker, those of a run by a version that wrote none."""
    try:
        note = json.loads(folders.read_plain(folder / MARKER, 1_000_000))
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
    names = {name for name in (CONFIG, REPORT, VERDICTS, *RECORDS) if (folder / name).is_file()}
    names |= {name for name in ADAPTERS if (folder / name / "adapter_config.json").is_file()}
    names |= {"runs"} if next((folder / "runs").rglob("events.out.tfevents*"), None) else set()
    return _stage_of(settings), names | {path.name for path in checkpoint.list_checkpoints(folder)}


def _stage_of(settings: dict[str, Any]) -> str:
    return max(STAGES, key=lambda name: len(settings.keys() & {item.name for item in dataclasses.fields(STAGES[name])}))


def _settings(path: Path) -> dict[str, Any]:
    """The settings in a file that ``dump_yaml`` wrote; empty for any other file."""
    if not (_starts_with(path, b"model_name_or_path:") or _starts_with(path, b"output_dir:")):
        return {}
    try:
        return read_yaml(str(path))
    except UserError:  # a broken file cannot be recognised as a run's
        return {}


def _starts_with(path: Path, beginning: bytes) -> bool:
    try:
        return folders.read_plain(path, len(beginning)) == beginning
    except OSError:
        return False


def _unfinished(name: str) -> tuple[str, ...]:
    """Temporary names under which ``name`` is written before it is complete."""
    return f"{name}.writing", f"{name}.replaced", f".{name}.tmp"


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        folders.delete(path, checkpoint.listed(path))
    elif os.path.lexists(path):
        path.unlink()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot change {path}: {error.strerror}; mend that, or name another --output_dir") from error
