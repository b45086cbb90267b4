"""Checkpoints: bitwise round trips, atomic writes, damage is detected and skipped, rotation, a full disk."""

import errno
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import SafetensorError

from rlhf_fast import checkpoint
from rlhf_fast.checkpoint import MANIFEST, TENSORS, VALUES, State
from rlhf_fast.errors import UserError


def nothing(folder: Path) -> None:
    pass


def adapter(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "adapter_config.json").write_text("{}")


def save(folder: Path, step: int, also: Callable[[Path], None] = adapter, keep: int = 9) -> Path:
    state = State(step, {"x": torch.arange(5.0)}, {"recipe": {"kl_coef": 0.1}})
    return checkpoint.save(folder, state, also=also, keep=keep)


def seal(path: Path) -> None:
    """The manifest of a checkpoint whose files have been changed on purpose."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST]
    entries = {
        str(file.relative_to(path)): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    (path / MANIFEST).write_text(json.dumps(entries))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- round trips ---------------------------------------------------------------------------------------------------


def test_tensors_and_values_come_back_bitwise(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 4).bfloat16(),
        "strided": torch.randn(6, 4)[::2, 1:3].t(),
        "parameter": torch.nn.Parameter(torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40])),
        "step": torch.tensor(7.0),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
    }
    values = {"recipe": {"kl_coef": 0.1 + 0.2, "kl_history": [1.0, 2.5]}, "scheduler": {"_last_lr": [1e-4 / 3]}}
    path = checkpoint.save(tmp_path, State(12, tensors, values), also=nothing, keep=2)
    assert path == tmp_path / "checkpoint-12" and names(path) == {MANIFEST, TENSORS, VALUES}
    state = checkpoint.load(path)
    assert (state.step, state.values) == (12, values)
    assert state.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = state.tensors[name]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert (
            read.contiguous().view(-1).view(torch.uint8).equal(tensor.detach().contiguous().view(-1).view(torch.uint8))
        )


def test_every_random_generator_goes_on_where_it_stood(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        python = [random.random(), random.gauss(0, 1), random.sample(range(100), 5)]
        return python, numpy.random.rand(3).tolist(), numpy.random.randn(1).tolist(), torch.randn(4).tolist()

    before = checkpoint.random_state()
    try:
        random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
        draw()  # gauss() and randn() now hold the second value of a pair
        tensors, values = checkpoint.random_state()
        path = checkpoint.save(tmp_path, State(1, tensors, {"random": values}), also=nothing, keep=1)
        expected = [draw(), draw()]
        random.seed(7), numpy.random.seed(7), torch.manual_seed(7)
        state = checkpoint.load(path)
        checkpoint.set_random_state(state.tensors, state.values["random"])
        assert [draw(), draw()] == expected
    finally:
        checkpoint.set_random_state(*before)


def trained(steps: int) -> tuple[torch.nn.Sequential, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        train(model, optimizer)
    return model, optimizer


def train(model: torch.nn.Sequential, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def test_adamw_goes_on_bitwise(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    saved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tensors = checkpoint.optimizer_tensors(optimizer, {p: name for name, p in model.named_parameters()})
    assert {name.rsplit("/", 1)[1] for name in tensors} == {"step", "exp_avg", "exp_avg_sq"} and len(tensors) == 12
    path = checkpoint.save(tmp_path, State(3, tensors), also=nothing, keep=1)
    train(model, optimizer)

    other, fresh = trained(0)
    other.load_state_dict(saved)
    checkpoint.restore_optimizer(fresh, {p: n for n, p in other.named_parameters()}, checkpoint.load(path).tensors)
    train(other, fresh)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    again = checkpoint.optimizer_tensors(fresh, {p: name for name, p in other.named_parameters()})
    now = checkpoint.optimizer_tensors(optimizer, {p: name for name, p in model.named_parameters()})
    assert again.keys() == now.keys() and all(torch.equal(again[name], now[name]) for name in now)


def test_restored_optimizer_state_is_a_copy(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    by_name = {p: name for name, p in model.named_parameters()}
    tensors = {name: t.clone() for name, t in checkpoint.optimizer_tensors(optimizer, by_name).items()}
    kept = {name: t.clone() for name, t in tensors.items()}
    checkpoint.restore_optimizer(optimizer, by_name, tensors)
    train(model, optimizer)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


# ---- atomic writes -------------------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_no_target_and_the_earlier_one_whole(tmp_path: Path) -> None:
    older = save(tmp_path, 1)

    def fail(folder: Path) -> None:
        adapter(folder)
        assert folder.parent == tmp_path and folder.name == "checkpoint-2.writing"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, fail, keep=1)
    assert names(tmp_path) == {"checkpoint-1"} and checkpoint.damage(older) is None


def test_a_checkpoint_written_again_is_replaced_only_when_whole(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise ValueError("no")

    path = save(tmp_path, 1)
    with pytest.raises(ValueError, match="no"):
        save(tmp_path, 1, fail)
    assert checkpoint.damage(path) is None
    stale = path / "policy" / "tokenizer.json"  # of a run that saved more
    stale.write_text("")
    (path / "notes.txt").write_text("mine")
    assert "notes.txt" in names(save(tmp_path, 1)) and checkpoint.damage(path) is None
    assert not stale.exists()


def test_what_a_killed_run_left_half_written_is_ignored_and_cleared(tmp_path: Path) -> None:
    half = tmp_path / "checkpoint-2.writing"
    half.mkdir()
    (half / "junk").write_text("junk")
    older = save(tmp_path, 1)
    assert checkpoint.list_checkpoints(tmp_path) == [older]
    assert checkpoint.newest(tmp_path, pytest.fail) == older
    assert names(save(tmp_path, 2)) == {MANIFEST, TENSORS, VALUES, "policy"}
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2"}


def test_the_manifest_lists_every_file_and_the_folder_appears_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    flush = checkpoint._flush

    def spy(path: Path) -> None:
        assert path == tmp_path or not (tmp_path / "checkpoint-1").exists()
        flushed.append(path.name)
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", spy)
    path = save(tmp_path, 1)
    listed = json.loads((path / MANIFEST).read_text())
    assert set(listed) == {TENSORS, VALUES, "policy/adapter_config.json"}
    assert set(flushed) >= {TENSORS, VALUES, "adapter_config.json", MANIFEST, "checkpoint-1.writing", tmp_path.name}


# ---- damage --------------------------------------------------------------------------------------------------------


def truncate(name: str) -> Callable[[Path], Any]:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 1)


def flip(name: str) -> Callable[[Path], Any]:
    def act(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[-1] ^= 1
        (path / name).write_bytes(content)

    return act


def overwrite(name: str, content: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(content)


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: (path / TENSORS).unlink(), f"{TENSORS} is missing"),
    (lambda path: (path / VALUES).unlink(), f"{VALUES} is missing"),
    (lambda path: (path / "policy" / "adapter_config.json").unlink(), "policy/adapter_config.json is missing"),
    (truncate(TENSORS), f"{TENSORS} has "),
    (truncate(VALUES), f"{VALUES} has "),
    (flip(TENSORS), f"{TENSORS} has changed"),
    (flip(VALUES), f"{VALUES} has changed"),
    (flip("policy/adapter_config.json"), "policy/adapter_config.json has changed"),
    (lambda path: (path / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    (overwrite(MANIFEST, ""), f"{MANIFEST} is not JSON"),
    (truncate(MANIFEST), f"{MANIFEST} is not JSON"),
    (lambda path: (path / MANIFEST).write_bytes(b"\xff\xff"), f"{MANIFEST} is not JSON"),
    (overwrite(MANIFEST, "[]"), f"{MANIFEST} does not list"),
    (overwrite(MANIFEST, "{}"), f"{MANIFEST} does not list"),
    (overwrite(MANIFEST, json.dumps({TENSORS: 1, VALUES: 2})), f"{MANIFEST} does not give size"),
    (overwrite(MANIFEST, "[" * 100_000), f"{MANIFEST} is not JSON"),
    (lambda path: [(path / MANIFEST).unlink(), (path / MANIFEST).mkdir()], f"{MANIFEST} cannot be read: Is a dir"),
    (overwrite(MANIFEST, json.dumps({TENSORS: 1, VALUES: 2, "../x": 3}).replace("1", "{}")), f"{MANIFEST} does not"),
    (overwrite(MANIFEST, json.dumps({"/etc/passwd": 3, TENSORS: 1, VALUES: 2})), f"{MANIFEST} names a file outside"),
]


@pytest.mark.parametrize(("harm", "expected"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, harm: Callable[[Path], Any], expected: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == newer and said == []
    harm(newer)
    problem = checkpoint.damage(newer)
    assert problem is not None and problem.startswith(expected)
    assert checkpoint.newest(tmp_path, said.append) == older
    assert len(said) == 1 and str(newer) in said[0] and problem in said[0] and "passed over" in said[0]
    with pytest.raises(UserError) as error:
        checkpoint.load(newer)
    assert str(newer) in str(error.value) and problem in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{}", "step must be a whole number, 0 or above; got None"),
        ("[]", "step must be a whole number"),
        ("[" * 100_000, "its state cannot be read"),
        ('{"step": "2"}', "got '2'"),
        ('{"step": -5}', "got -5"),
        ('{"step": true}', "got True"),
        ('{"step": 3}', "it is of step 3, and the folder's name of another"),
    ],
)
def test_a_whole_checkpoint_that_holds_no_state_is_refused(tmp_path: Path, state: str, message: str) -> None:
    path = save(tmp_path, 2)
    (path / VALUES).write_text(state)
    seal(path)
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_another_optimizers_state_is_refused() -> None:
    model, optimizer = trained(1)
    names_of = {parameter: name for name, parameter in model.named_parameters()}
    tensors = checkpoint.optimizer_tensors(optimizer, names_of)
    renamed = {f"other.{name}": tensor for name, tensor in tensors.items()}
    reshaped = {name: tensor.new_zeros(7) if "exp" in name else tensor for name, tensor in tensors.items()}
    for wrong in (renamed, reshaped, dict(list(tensors.items())[:3])):
        with pytest.raises(ValueError, match="optimizer"):
            checkpoint.restore_optimizer(optimizer, names_of, wrong)


def test_no_single_byte_of_the_manifest_can_change_unseen(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = (path / MANIFEST).read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        (path / MANIFEST).write_bytes(changed)
        assert checkpoint.damage(path) is not None, f"byte {place}: {content[place : place + 1]!r}"


def test_where_all_are_damaged_or_none_is_there_there_is_no_newest(tmp_path: Path) -> None:
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) is None and said == []
    assert checkpoint.newest(tmp_path / "none", said.append) is None
    for step in (1, 2):
        (save(tmp_path, step) / TENSORS).unlink()
    assert checkpoint.newest(tmp_path, said.append) is None and len(said) == 2


# ---- rotation ------------------------------------------------------------------------------------------------------


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    assert checkpoint.newest(tmp_path, pytest.fail) == tmp_path / "checkpoint-11"


def test_nothing_that_is_no_checkpoint_is_deleted(tmp_path: Path) -> None:
    others = {"checkpoint-best", "checkpoint-1-copy", "checkpoint-²", "checkpoint-01", "checkpoint-2", "adapter"}
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-0").write_text("a file")
    save(tmp_path / "elsewhere", 1)
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "elsewhere" / "checkpoint-1")
    for step in (3, 4, 5):
        save(tmp_path, step, keep=1)
    checkpoint.drop_after(tmp_path, 0)
    assert names(tmp_path) == others | {"checkpoint-0", "checkpoint-1", "elsewhere"}
    assert checkpoint.damage(tmp_path / "elsewhere" / "checkpoint-1") is None


def test_what_was_just_written_is_never_rotated_away(tmp_path: Path) -> None:
    """A run that resumes from checkpoint-3 while 9 and 10 still exist must keep its own checkpoint-4."""
    for step in (3, 9, 10, 4):
        path = save(tmp_path, step, keep=2)
        assert checkpoint.damage(path) is None
    assert "checkpoint-4" in names(tmp_path)


# ---- a full disk ---------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[Path], None]:
    def also(folder: Path) -> None:
        raise error

    return also


def write_to_a_full_device(folder: Path) -> None:
    with open("/dev/full", "w") as file:
        file.write("x")


FULL: list[Callable[[Path], None]] = [
    raising(OSError(errno.ENOSPC, "No space left on device")),
    raising(OSError(errno.EDQUOT, "Disk quota exceeded")),
    raising(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
    write_to_a_full_device,
]


@pytest.mark.parametrize("also", FULL)
def test_a_full_disk_is_an_error_of_one_line_and_the_earlier_checkpoint_is_whole(
    tmp_path: Path, also: Callable[[Path], None]
) -> None:
    older = save(tmp_path, 1)
    with pytest.raises(UserError) as error:
        save(tmp_path, 2, also, keep=1)
    message = str(error.value)
    assert f"cannot write {tmp_path / 'checkpoint-2'}: the disk is full" in message and "\n" not in message
    assert "--resume_from_checkpoint auto" in message
    assert names(tmp_path) == {"checkpoint-1"} and checkpoint.damage(older) is None


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'file' / 'checkpoint-1'}"):
        save(tmp_path / "file", 1)


def test_a_mistake_in_the_code_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, 1, raising(ZeroDivisionError()))
