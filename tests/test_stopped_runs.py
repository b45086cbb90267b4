"""Runs that stop early: interrupted, NaN or inf, a full disk, damaged checkpoints. Each reports its last step in one
line, leaves a complete checkpoint of it, and resumes from there."""

import asyncio
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_lines import OWN, arguments, write_data
from safetensors.torch import load_file, save_file

from rlhf_fast import signals
from rlhf_fast.checkpoint import damage, list_checkpoints, whole_folder
from rlhf_fast.errors import UserError
from rlhf_fast.recipes.snapshots import Snapshots
from rlhf_fast.recipes.stage import Stage
from rlhf_fast.rollout.generation import Generation
from rlhf_fast.rollout.reference import RealTokensOnly

STAGES = list(OWN)
SECONDS = 90


def whole_checkpoints(folder: Path) -> list[str]:
    """The checkpoints' names; none is damaged, there are no partial files, every metrics line parses."""
    found = list_checkpoints(folder)
    assert [damage(path) for path in found] == [None] * len(found)
    assert not [path for path in folder.rglob("*") if path.name.endswith((".writing", ".tmp", ".part"))]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] <= 3
    return [path.name for path in found]


def in_step(number: int, act, monkeypatch, method: str = "backward") -> None:
    """Before the step's first backward pass (or another method of Stage), once: ``act(loss or None)``."""
    real, done = getattr(Stage, method), []

    def patched(stage, *args):
        if stage.step == number - 1 and not done:
            done.append(True)
            args = act(*args) or args
        return real(stage, *args)

    monkeypatch.setattr(Stage, method, patched)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_in_a_step(stage, number, command, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        in_step(3, lambda loss: signal.raise_signal(number), patch)
        outcome = command(stage, "--max_steps 4 --save_steps 4")
    checkpoint = "out/checkpoint-2"
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == (
        f"{stage}: stopped after step 2 of 4; checkpoint {checkpoint}; go on with --resume_from_checkpoint auto"
    )
    assert whole_checkpoints(tmp_path / "out") == ["checkpoint-2"]
    outcome = command(stage, "--max_steps 4 --resume_from_checkpoint auto")
    assert outcome.code == 0
    assert f"{stage}: going on after step 2 from {checkpoint}" in outcome.err


@pytest.mark.parametrize(
    ("engine", "owner", "method"), [("transformers", RealTokensOnly, "__call__"), ("fast", Generation, "step")]
)
def test_interrupted_while_sampling(engine, owner, method, command, monkeypatch, tmp_path):
    real, calls = getattr(owner, method), []

    def interrupting(self, *args):
        calls.append(True)
        if (tmp_path / "out" / "checkpoint-1").is_dir():
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupting)
        outcome = command("ppo", f"--eval_size 0 --save_steps 1 --rollout_engine {engine}")
    assert outcome.code == 130
    assert "ppo: stopped after step 1 of 2; checkpoint out/checkpoint-1; go on with" in outcome.err
    assert whole_checkpoints(tmp_path / "out") == ["checkpoint-1"]
    assert command("ppo", "--eval_size 0 --resume_from_checkpoint auto").code == 0


def test_interrupted_process(tmp_path, tiny_adapters):
    """A real Ctrl-C: a separate process, interrupted at an arbitrary time."""
    write_data(tmp_path)
    flags = "--max_steps 100000 --save_steps 100000 --eval_size 0"
    line = [sys.executable, "-m", "rlhf_fast.cli", *arguments("ppo", flags, tiny_adapters)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "out" / "metrics.jsonl").exists():  # its first line is written with the first step
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 130, err
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    assert damage(checkpoint) is None
    last = err.splitlines()[-1]
    assert last.startswith("ppo: stopped after step") and f"out/{checkpoint.name}; go on with" in last


def test_a_signal_while_leaving_is_the_same_press_and_a_later_one_leaves_at_once(command, monkeypatch, tmp_path):
    real, seconds = Snapshots.write, [0.01, signals.SAME_PRESS_SECONDS]

    def interrupted_again(self, state):
        signals.SAME_PRESS_SECONDS = seconds.pop()
        time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)
        return real(self, state)

    monkeypatch.setattr(signals, "SAME_PRESS_SECONDS", 1.0)
    for last in ("checkpoint out/checkpoint-2", "it was not written; no checkpoint yet"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with monkeypatch.context() as patch:
            in_step(3, lambda loss: signal.raise_signal(signal.SIGINT), patch)
            patch.setattr(Snapshots, "write", interrupted_again)
            outcome = command("sft", "--max_steps 4 --save_steps 4 --eval_size 0")
        assert outcome.code == 130 and "Traceback" not in outcome.err
        assert outcome.err.splitlines()[-1] == (
            f"sft: stopped after step 2 of 4; {last}; go on with --resume_from_checkpoint auto"
        )
        whole_checkpoints(tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored(command, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        in_step(2, lambda loss: signal.raise_signal(signal.SIGHUP), monkeypatch)
        assert command("sft", "--eval_size 0").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_says_something(number, command, monkeypatch):
    monkeypatch.setattr("rlhf_fast.recipes.sft.load_rows", lambda *_: signal.raise_signal(number))
    outcome = command("sft")
    assert outcome.code == 130 and outcome.err == "rlhf-fast: interrupted\n"


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), asyncio.CancelledError()])
def test_code_that_ends_its_process_ends_no_run_as_finished(error, command, monkeypatch, tmp_path):
    def leave(*_):
        raise error

    with monkeypatch.context() as patch:
        in_step(3, leave, patch)
        outcome = command("sft", "--max_steps 4 --save_steps 4 --eval_size 0")
    assert outcome.code == 2
    stopped, last = outcome.err.splitlines()[-2:]
    assert stopped == "sft: stopped after step 2 of 4; checkpoint out/checkpoint-2"
    assert f"sft step 3: code that it ran ended it by {type(error).__name__}" in last
    assert whole_checkpoints(tmp_path / "out") == ["checkpoint-2"]
    assert command("sft", "--max_steps 4 --eval_size 0 --resume_from_checkpoint auto").code == 0


def test_sys_exit_before_the_loop_is_no_success(command, monkeypatch):
    monkeypatch.setattr("rlhf_fast.recipes.sft.load_rows", lambda *_: sys.exit(0))
    outcome = command("sft")
    assert outcome.code == 2 and "called sys.exit(0): it has not finished" in outcome.err


@pytest.mark.parametrize("stage", STAGES)
def test_not_finite_names_step_and_rows_and_can_be_resumed(stage, command, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        in_step(2, lambda loss: (loss * float("nan"),), patch)
        outcome = command(stage)
    assert outcome.code == 2
    stopped, last = outcome.err.splitlines()[-2:]
    assert stopped == f"{stage}: stopped after step 1 of 2; checkpoint out/checkpoint-1"
    message, _, rest = last.partition("not finite; batch of rows ")
    assert message.startswith(f"rlhf-fast: error: {stage} step 2: loss ") and "gradient norm nan" in message
    rows = [int(row) for row in rest.partition(".")[0].split(", ")]
    assert len(set(rows)) == 4 and all(1 <= row <= 12 for row in rows)
    assert "--learning_rate" in rest
    assert whole_checkpoints(tmp_path / "out") == ["checkpoint-1"]
    assert command(stage, "--resume_from_checkpoint auto").code == 0


def test_an_adapter_with_nan_is_refused(command, tiny_adapters, tmp_path):
    folder = shutil.copytree(tiny_adapters["sft"], tmp_path / "spoilt")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name][0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    outcome = command("reward", "--sft_adapter spoilt")
    assert outcome.code == 2
    assert f"spoilt/adapter_model.safetensors: {name} holds NaN or infinity" in outcome.err


# Files of more bytes than this cannot be written, from step 2 on: the metrics, the report, the adapter, the checkpoint.
FULL = {
    "metrics": ("sft", 200, "could not write out/metrics.jsonl: File too large"),
    "report": ("sft", 5_000, "could not write out/report.html: File too large|cannot write out/best"),
    "adapter": ("sft", 60_000, "cannot write out/best: .*File too large"),
    "sft checkpoint": ("sft", 60_000, "cannot write out/checkpoint-2: .*File too large"),
    "reward checkpoint": ("reward", 60_000, "cannot write out/checkpoint-2: .*File too large"),
    "ppo checkpoint": ("ppo", 60_000, "cannot write out/checkpoint-2: .*File too large"),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_loses_nothing_and_the_run_can_go_on(case, command, monkeypatch, tmp_path):
    stage, size, message = FULL[case]
    flags = "--eval_size 0" if "checkpoint" in case else ""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            limits = (size, before[1])
            in_step(2, lambda loss: resource.setrlimit(resource.RLIMIT_FSIZE, limits), patch)
            outcome = command(stage, f"{flags} --max_steps 3 --save_steps 1 --eval_steps 1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert outcome.code == 2, outcome.err
    assert re.search(f"rlhf-fast: error: .*{message}", outcome.err.splitlines()[-1]), outcome.err
    assert whole_checkpoints(tmp_path / "out") == ["checkpoint-1"]
    outcome = command(stage, f"{flags} --max_steps 3 --resume_from_checkpoint auto")
    assert outcome.code == 0 and "going on after step 1" in outcome.err


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_a_folder_is_replaced_as_a_whole_or_not_at_all(error, tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "vocab.json").write_text("old")
    with pytest.raises(UserError, match="cannot write .*adapter: the disk is full; .* make room"):
        with whole_folder(target) as work:
            (work / "half").write_text("half")
            raise error
    with pytest.raises(ZeroDivisionError), whole_folder(target):  # a defect stays a defect
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "vocab.json"]
    with whole_folder(target) as work:
        (work / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "new"]


@pytest.fixture
def finished(command):
    """An SFT run of 2 steps in ``out``, with a checkpoint of each."""
    assert command("sft", "--save_steps 1 --eval_size 0").code == 0
    return lambda stage, flags: command(stage, f"--eval_size 0 --max_steps 3 {flags}")


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path):
    state = tmp_path / "out" / "checkpoint-2" / "state.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[:-5])
    outcome = finished("sft", "--resume_from_checkpoint out/checkpoint-2")
    assert outcome.code == 2
    assert f"out/checkpoint-2 is not a whole checkpoint: state.safetensors has {len(content) - 5} bytes" in outcome.err
    outcome = finished("sft", "--resume_from_checkpoint auto")
    assert outcome.code == 0
    assert "out/checkpoint-2 is damaged" in outcome.err
    assert "sft: going on after step 1 from out/checkpoint-1" in outcome.err


@pytest.mark.parametrize("flags", ["--lora_r 4", "--lora_target_modules q_proj", "--lora_layers 2"])
def test_a_checkpoint_of_another_config_is_refused(flags, finished, tmp_path):
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    outcome = finished("sft", f"--resume_from_checkpoint auto {flags}")
    assert outcome.code == 2
    assert "out/checkpoint-2: sft/" in outcome.err and "does not fit this config's adapters; resume with" in outcome.err
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_stage_is_refused(finished):
    outcome = finished("reward", "--output_dir other --resume_from_checkpoint out/checkpoint-2")
    assert outcome.code == 2 and "out/checkpoint-2 is not in --output_dir other" in outcome.err
    for name in ("out/checkpoint-2", "auto"):
        outcome = finished("reward", f"--resume_from_checkpoint {name}")
        assert outcome.code == 2
        assert (
            "out is the folder of `rlhf-fast sft`, and this is `rlhf-fast reward`: name another --output_dir"
            in outcome.err
        )


def test_going_on_with_a_finished_run_ends_at_once(finished, tmp_path):
    outcome = finished("sft", "--resume_from_checkpoint auto --max_steps 2")
    assert outcome.code == 0 and "going on after step 2" in outcome.err
    assert whole_checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]
