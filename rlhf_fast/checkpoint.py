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
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf_fast.errors import UserError

MANIFEST, TENSORS, VALUES = "manifest.json", "state.safetensors", "state.json"
PREFIX = "checkpoint-"


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
    target = folder / f"checkpoint-{state.step}"
    with whole_folder(target) as work:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}, work / TENSORS)
        (work / VALUES).write_text(json.dumps({"step": state.step, **state.values}))
        also(work)
        files = [path for path in sorted(work.rglob("*")) if path.is_file()]
        manifest = {
            str(path.relative_to(work)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*files, work / MANIFEST, work]:
            _flush(path)
    _flush(folder)
    there = list_checkpoints(folder)
    for old in there[: there.index(target) + 1][:-keep]:  # later ones are of a run that went on from further back
        shutil.rmtree(old, ignore_errors=True)
    return target


def drop_after(folder: Path, step: int) -> None:
    """Deletes checkpoints of later steps: a run that goes on from ``step`` leaves the course they were on."""
    for path in list_checkpoints(folder):
        if int(path.name.removeprefix(PREFIX)) > step:
            shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders by step, oldest first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


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
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is not JSON"
    if not isinstance(manifest, dict) or not {TENSORS, VALUES} <= manifest.keys():
        return f"{MANIFEST} does not list {TENSORS} and {VALUES}"
    for name, entry in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            return f"{MANIFEST} does not give size and SHA-256 of {name}"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def load(path: Path) -> State:
    """Reads a checkpoint; UserError where it is damaged."""
    problem = damage(path)
    if problem is not None:
        raise UserError(
            f"{path} is not a whole checkpoint: {problem}; name another, or use --resume_from_checkpoint auto"
        )
    values = json.loads((path / VALUES).read_text())
    return State(step=values.pop("step"), tensors=load_file(path / TENSORS), values=values)


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
    """The inverse of ``optimizer_tensors``."""
    parameters = {name: parameter for parameter, name in names.items()}
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        place = "cpu" if key == "step" else parameter.device
        optimizer.state[parameter][key] = value.clone().to(place)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes ``target``'s place at the end of the block: never half of one, whatever fails.

    Raises UserError where the disk is full or the place cannot be written; ``target`` is then as it was.
    """
    work = target.with_name(f"{target.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        shutil.rmtree(target, ignore_errors=True)
        work.replace(target)
    except Exception as error:
        # safetensors and tokenizers write through Rust, which names the errno in the text alone
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        reason = "the disk is full" if full else str(error)
        raise UserError(
            f"cannot write {target}: {reason}; what was written before it is whole: make room, then go on with "
            "--resume_from_checkpoint auto"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
