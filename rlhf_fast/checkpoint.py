"""checkpoint-N/: everything a run needs to go on as if it had never stopped. Safetensors and JSON, written atomically.

A checkpoint is a folder of files and a ``manifest.json`` with each file's size and SHA-256. It is written under a
temporary name and renamed when it is whole; what does not match its manifest is passed over when resuming.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf_fast import folders
from rlhf_fast.errors import UserError
from rlhf_fast.text import one_line, shown

MANIFEST, TENSORS, VALUES = "manifest.json", "state.safetensors", "state.json"
PREFIX = "checkpoint-"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})", re.ASCII)
LARGEST_MANIFEST = 10_000_000  # bytes


@dataclass
class State:
    """``tensors`` by name and JSON-able ``values``, after ``step`` finished steps."""

    step: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, state: State, *, also: Callable[[Path], None], keep: int) -> Path:
    """Writes ``folder/checkpoint-<step>`` and deletes the oldest beyond ``keep``.

    ``also`` writes further files (the adapters) into the folder it is given. Raises UserError on a full disk; the
    checkpoints already there stay as they were.
    """
    target = folder / f"{PREFIX}{state.step}"
    with whole_folder(target) as work:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}, work / TENSORS)
        (work / VALUES).write_text(json.dumps({"step": state.step, **state.values}))
        also(work)
        written = [path for path in sorted(work.rglob("*")) if path.is_file()]
        manifest = {
            str(path.relative_to(work)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in written
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*written, work / MANIFEST, work]:
            _flush(path)
    _flush(folder)
    there = list_checkpoints(folder)
    for old in there[: there.index(target) + 1][:-keep]:  # later ones are of a run that went on from further back
        _delete(old)
    return target


def drop_after(folder: Path, step: int) -> None:
    """Deletes checkpoints of later steps: a run that goes on from ``step`` leaves the course they were on."""
    for path in list_checkpoints(folder):
        if step_of(path.name) > step:
            _delete(path)


def step_of(name: str) -> int:
    """The step of a folder called checkpoint-N; -1 for any other name."""
    found = NAME.fullmatch(name)
    return int(found[1]) if found else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders by step, oldest first, whole or not."""
    found = [path for path in folder.glob(f"{PREFIX}*") if step_of(path.name) >= 0 and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path.name))


def is_ours(path: Path) -> bool:
    """True for a folder, not a link to one, whose manifest is one that ``save`` wrote: alone these are ever deleted."""
    return not path.is_symlink() and isinstance(_manifest(path), dict)


def _delete(path: Path) -> None:
    if is_ours(path):
        with contextlib.suppress(OSError):  # what cannot be deleted takes room and harms nothing
            folders.delete(path, listed(path))


def listed(path: Path) -> dict[str, Any]:
    """The files that a checkpoint's manifest lists; none where it has none that can be read."""
    manifest = _manifest(path)
    return manifest if isinstance(manifest, dict) else {}


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint. Each damaged one is named through ``say`` and passed over."""
    for path in reversed(list_checkpoints(folder)):
        problem = damage(path)
        if problem is None:
            return path
        say(f"{path} is damaged ({problem}); passed over, the one before it is used")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder; None where every file is as its manifest says."""
    manifest = _manifest(path)
    if isinstance(manifest, str):
        return manifest
    for name, entry in manifest.items():
        try:
            problem = _file_damage(path, name, entry)
        except OSError as error:
            problem = f"{shown(name)} cannot be read: {error.strerror}"
        if problem is not None:
            return problem
    return None


def _manifest(path: Path) -> dict[str, Any] | str:
    """The manifest's entries, or what is wrong with it."""
    try:
        manifest = json.loads(folders.read_plain(path / MANIFEST, LARGEST_MANIFEST))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is not JSON"
    if not isinstance(manifest, dict) or not {TENSORS, VALUES} <= manifest.keys():
        return f"{MANIFEST} does not list {TENSORS} and {VALUES}"
    return manifest


def _file_damage(path: Path, name: str, entry: Any) -> str | None:
    file = path / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{MANIFEST} names a file outside: {shown(name)}"
    name = one_line(name, 200)
    if not file.is_file():
        return f"{name} is missing"
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        return f"{MANIFEST} does not give size and SHA-256 of {name}"
    if file.stat().st_size != entry["bytes"]:
        return f"{name} has {file.stat().st_size} bytes, not {shown(entry['bytes'])}"
    if _sha256(file) != entry["sha256"]:
        return f"{name} has changed since it was written"
    return None


def load(path: Path) -> State:
    """Reads a checkpoint; UserError where it is damaged, or whole and yet not what ``save`` writes."""
    problem = damage(path)
    if problem is not None:
        raise UserError(
            f"{path} is not a whole checkpoint: {problem}; name another, or use --resume_from_checkpoint auto"
        )
    try:
        values = json.loads((path / VALUES).read_text(encoding="utf-8"))
        tensors = load_file(path / TENSORS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: its state cannot be read ({one_line(str(error), 200)}); name another") from error
    step = values.pop("step", None) if isinstance(values, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(f"{path / VALUES}: step must be a whole number, 0 or above; got {shown(step)}; name another")
    if step_of(path.name) not in (-1, step):
        raise UserError(f"{path / VALUES}: it is of step {shown(step)}, and the folder's name of another; name another")
    return State(step=step, tensors=tensors, values=values)


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every random-number generator of this process: torch (CPU and each GPU), NumPy, Python."""
    kind, keys, *numpy_rest = numpy.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(numpy.asarray(keys, dtype="int64"))}
    if torch.cuda.is_available():
        tensors |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    version, internal, gauss = random.getstate()
    return tensors, {"numpy": [kind, *numpy_rest], "python": [version, list(internal), gauss]}


def set_random_state(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """The inverse of ``random_state``."""
    torch.set_rng_state(tensors["torch"])
    gpus = [tensors[f"cuda{index}"] for index in range(sum(name.startswith("cuda") for name in tensors))]
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
    kind, *numpy_rest = values["numpy"]
    numpy.random.set_state((kind, tensors["numpy"].numpy().astype("uint32"), *numpy_rest))
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> dict[str, torch.Tensor]:
    """The optimizer's per-parameter state, as ``name/exp_avg`` and the like."""
    return {
        f"{name}/{key}": value for parameter, name in names.items() for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of ``optimizer_tensors``; ValueError where the tensors are of other parameters."""
    parameters = {name: parameter for parameter, name in names.items()}
    found = {full_name.rsplit("/", 1)[0] for full_name in tensors}
    if found and found != parameters.keys():  # none at all: before the first step
        raise ValueError(f"the optimizer's state is of other parameters, such as {min(found ^ parameters.keys())}")
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        if key != "step" and value.shape != parameter.shape:
            raise ValueError(f"the optimizer's {full_name} has the shape {tuple(value.shape)}")
        optimizer.state[parameter][key] = value.clone().to(parameter.device)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes ``target``'s place at the end of the block: never half of one, whatever fails.

    Raises UserError where the disk is full or the place cannot be written; ``target`` is then as it was.
    """
    work, before = (target.with_name(f"{target.name}.{state}") for state in ("writing", "replaced"))
    if target.is_symlink():
        raise UserError(f"cannot write {target}: it is a link, which no run made; move it away, then go on")
    _clear_up(target, work, before)  # what a killed process left
    try:
        work.mkdir(parents=True)
        yield work
        if target.exists():
            target.replace(before)
        work.replace(target)
    except Exception as error:
        # safetensors and tokenizers write through Rust, which names the errno in the text alone
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        reason, advice = ("the disk is full", "make room") if full else (one_line(str(error), 400), "mend that")
        raise UserError(
            f"cannot write {target}: {reason}; what was written before it is whole: {advice}, then go on with "
            "--resume_from_checkpoint auto"
        ) from error
    finally:
        _clear_up(target, work, before)


def _clear_up(target: Path, work: Path, before: Path) -> None:
    """Nothing half-written stays. What ``target`` was comes back where nothing has taken its place; else what others
    have put into it does."""
    shutil.rmtree(work, ignore_errors=True)
    if before.is_dir() and not target.exists():
        before.replace(target)
    if before.is_dir():
        folders.carry(before, target, listed(before))
    shutil.rmtree(before, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
