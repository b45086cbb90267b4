"""What ends a run and is no mistake of the user's: its traceback is printed and kept. Out of memory is said as that."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_lines import arguments, write_data

from rlhf_fast.checkpoint import damage, list_checkpoints
from rlhf_fast.errors import is_out_of_memory
from rlhf_fast.models import SharedBase
from rlhf_fast.recipes.stage import Stage
from rlhf_fast.text import LONGEST_TRACEBACK

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.fixture
def failing(monkeypatch):
    """``failing(error, in_step)``: the backward pass of that step raises ``error``, once."""

    def patch(error: Exception, in_step: int = 2) -> None:
        real = Stage.backward

        def backward(stage, loss):
            if stage.step == in_step - 1:
                raise error
            real(stage, loss)

        monkeypatch.setattr(Stage, "backward", backward)

    return patch


def test_an_unexpected_exception_prints_its_traceback_and_leaves_it_in_the_folder(command, failing, tmp_path):
    failing(ZeroDivisionError("by \x1b[31mnothing"))
    outcome = command("sft", "--eval_size 0")
    assert outcome.code == 1
    lines = outcome.err.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert lines[-1] == r"rlhf-fast: internal error: ZeroDivisionError: by \x1b[31mnothing (the traceback is above)"
    assert "This traceback is in out/error.txt." in lines
    kept = (tmp_path / "out" / "error.txt").read_text()
    assert (
        "in backward" in kept and r"ZeroDivisionError: by \x1b[31mnothing" in kept and "\x1b" not in kept + outcome.err
    )
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, rlhf-fast .*, torch .*, Python ", kept)
    assert "error.txt" in json.loads((tmp_path / "out" / ".rlhf-fast.json").read_text())["names"]
    assert [damage(path) for path in list_checkpoints(tmp_path / "out")] == [None]


def test_a_failure_before_the_first_step_is_kept_too(command, monkeypatch, tmp_path):
    monkeypatch.setattr("rlhf_fast.recipes.sft.load_rows", lambda *_: 1 / 0)
    assert command("sft").code == 1
    assert "ZeroDivisionError" in (tmp_path / "out" / "error.txt").read_text()


def test_the_next_run_removes_it(command, failing, monkeypatch, tmp_path):
    with monkeypatch.context():
        failing(ZeroDivisionError("once"))
        assert command("sft", "--eval_size 0").code == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert command("sft", "--eval_size 0 --resume_from_checkpoint auto").code == 0
    assert not (tmp_path / "out" / "error.txt").exists()


def test_a_file_of_the_users_is_never_replaced(command, failing, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "error.txt").write_text("mine")
    outcome = command("sft")
    assert outcome.code == 2 and "'error.txt', which no run made there" in outcome.err
    (tmp_path / "out" / "error.txt").unlink()
    failing(ZeroDivisionError("x"))
    folder = tmp_path / "out"
    real = Stage.log

    def log(stage, *args, **named):
        (folder / "error.txt").write_text("mine")  # it comes while the run goes on
        real(stage, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "log", log)
        outcome = command("sft", "--eval_size 0")
    assert outcome.code == 1 and "This traceback could not be kept: out holds 'error.txt'" in outcome.err
    assert (folder / "error.txt").read_text() == "mine"


def test_a_long_traceback_is_cut_in_the_middle(command, failing, tmp_path):
    failing(ValueError("x" * 3 * LONGEST_TRACEBACK + "end"))
    outcome = command("sft", "--eval_size 0")
    kept = (tmp_path / "out" / "error.txt").read_text()
    assert LONGEST_TRACEBACK < len(kept) < LONGEST_TRACEBACK + 300 and "characters left out" in kept
    assert "Traceback" in kept and kept.rstrip().endswith("xend")
    assert len(outcome.err) < 2 * LONGEST_TRACEBACK


def test_a_mistake_leaves_no_traceback(command, tmp_path):
    outcome = command("sft", "--dataset_name nope.jsonl")
    assert outcome.code == 2 and "Traceback" not in outcome.err and not (tmp_path / "out" / "error.txt").exists()


def test_a_run_keeps_it_in_the_folder_of_the_stage(command, failing, tmp_path):
    failing(ZeroDivisionError("x"))
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: tiny-random\noutput_dir: out\nmax_length: 64\nbatch_size: 4\nmax_steps: 2\n"
        "stages: [sft]\nsft: {dataset_name: sft.jsonl, eval_size: 0}\n"
    )
    assert command("run", "--config run.yaml").code == 1
    assert (tmp_path / "out" / "sft" / "error.txt").is_file() and not (tmp_path / "out" / "error.txt").exists()


# ---- out of memory

OUT_OF_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "computer": RuntimeError(f"{CPU} 9000000000 bytes. Error code 12 (Cannot allocate memory)"),
}
WORK = {  # stage, what is called in it -> the work and its batch, the settings to lower
    ("sft", "hidden"): ("evaluation: .* 2 rows of up to ..? tokens", "--micro_batch_size (now 2), then --max_length"),
    ("reward", "scores"): (
        "evaluation: .* 4 rows of up to ..? tokens",
        "--micro_batch_size (now 2), then --max_length",
    ),
    ("dpo", "trunk"): ("update: .* 4 rows of up to ..? tokens", "--micro_batch_size (now 2), then --max_length"),
    ("ppo", "trunk"): (
        "scoring: .* 2 rows of up to ..? tokens",
        "--micro_batch_size (now 2), then --batch_size (now 4), then --max_length (now 64)",
    ),
}


@pytest.mark.parametrize("place", OUT_OF_MEMORY)
@pytest.mark.parametrize(("stage", "method"), WORK)
def test_out_of_memory_names_step_work_batch_and_setting(stage, method, place, command, monkeypatch, tmp_path):
    def refuse(*args, **named):
        raise OUT_OF_MEMORY[place]

    monkeypatch.setattr(SharedBase, method, refuse)
    outcome = command(stage, "--eval_size 4")
    batch, lower = WORK[stage, method]
    last = outcome.err.splitlines()[-1]
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert re.search(
        f"^rlhf-fast: error: {stage} step 1, {batch.replace(': .* ', f': the {place} has no memory for ')}", last
    )
    assert f"at a time: lower {lower}" in last and "--lora_layers N" in last
    assert str(OUT_OF_MEMORY[place])[:40] in last
    assert not (tmp_path / "out" / "error.txt").exists()


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling", CPU])
def test_plain_runtime_errors_of_full_memory_are_known(text):
    assert is_out_of_memory(RuntimeError(f"x {text} x")) and not is_out_of_memory(ValueError(text))
    assert is_out_of_memory(torch.OutOfMemoryError("")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("memory format option is only supported by strided tensors"))


def test_out_of_memory_in_an_update_keeps_the_last_step(command, failing, tmp_path):
    failing(OUT_OF_MEMORY["GPU"])
    for stage in ("sft", "reward", "dpo", "ppo"):
        outcome = command(stage, f"--eval_size 0 --output_dir {stage} --micro_batch_size 1 --lora_layers 2")
        last = outcome.err.splitlines()[-1]
        assert outcome.code == 2 and f"{stage} step 2, update: the GPU has no memory for " in last
        assert "--micro_batch_size" not in last and "--lora_layers" not in last and "--max_length (now 64)" in last
        assert [path.name for path in list_checkpoints(tmp_path / stage)] == ["checkpoint-1"]


def test_out_of_memory_while_sampling(command, monkeypatch):
    def refuse(*args, **named):
        raise OUT_OF_MEMORY["GPU"]

    monkeypatch.setattr("rlhf_fast.recipes.ppo.generate", refuse)
    last = command("ppo", "--eval_size 0 --rollout_batch_size 3").err.splitlines()[-1]
    assert re.search(r"ppo step 1, rollout: the GPU has no memory for 3 rows of up to \d\d tokens at a time", last)
    assert "lower --rollout_batch_size (now 3), then --response_length (now 8), then --max_length (now 64)" in last
    monkeypatch.setattr("rlhf_fast.recipes.ppo_report.generate", refuse)
    monkeypatch.setattr("rlhf_fast.recipes.reward.generate", refuse)
    last = command("reward", "--output_dir reward").err.splitlines()[-1]
    assert "reward step 2, calibration: the GPU has no memory for 4 rows" in last
    outcome = command("ppo", "--overwrite_output_dir true")
    assert "ppo step 1, evaluation: the GPU has no memory for 1 rows" in outcome.err.splitlines()[-1]


def test_out_of_memory_anywhere_else_is_no_defect(command, monkeypatch):
    def refuse(*args):
        raise MemoryError

    monkeypatch.setattr("rlhf_fast.recipes.sft.load_rows", refuse)
    outcome = command("sft")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("rlhf-fast: error: out of memory: lower --micro_batch_size")


LIMITED = """
import resource, sys
from rlhf_fast.cli import main
from rlhf_fast.recipes import sft

real = sft.loss_sum

def limited(stage, rows):
    if len(rows) > 4:  # a whole micro-batch: from here on, 64 MB more and no more than that
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 64_000_000
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    return real(stage, rows)

sft.loss_sum = limited
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to know the process's size")
def test_a_process_that_gets_no_more_memory(tmp_path):
    write_data(tmp_path)
    lines = [{"prompt": "q" * 200, "completion": f"{i} " + "a" * 200} for i in range(256)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = arguments("sft", "--eval_size 0 --batch_size 256 --micro_batch_size 256 --max_length 512", {})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert re.search(r"sft step 1, update: the computer has no memory for 256 rows of up to 4\d\d tokens", last)
    assert "lower --micro_batch_size (now 256), then --max_length (now 512)" in last
