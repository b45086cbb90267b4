"""Files in an output folder that no run created are never deleted or replaced; one run per folder at a time."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.monitor.follow import report
from rlhf_fast.recipes import lock as folder_lock
from rlhf_fast.recipes.records import Records

OTHERS = {
    "adapter/weights.txt": "mine",
    "best/weights.txt": "mine",
    "policy/weights.txt": "mine",
    "critic/weights.txt": "mine",
    "runs/other/p.txt": "mine",
    "checkpoint-7/p.txt": "mine",
    "report.html": "mine",
    "metrics.jsonl": "mine",
    "error.txt": "mine",
    "config.yaml": "# mine",
    ".config.yaml.tmp": "mine",
    "adapter.writing/p.txt": "mine",
}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def put(folder: Path, name: str, content: str = "mine") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize("overwrite", ["", "--overwrite_output_dir true", "--resume_from_checkpoint auto"])
@pytest.mark.parametrize("name", OTHERS)
def test_what_no_run_made_is_in_the_way_and_stays(name, overwrite, command, tmp_path):
    put(tmp_path / "out", name)
    before = contents(tmp_path / "out")
    outcome = command("sft", overwrite)
    assert outcome.code == 2 and "which no run made there" in outcome.err
    assert name.split("/")[0] in outcome.err
    assert contents(tmp_path / "out") == before


def test_other_names_are_no_concern_of_a_run(command, tmp_path):
    kept = [put(tmp_path / "out", name) for name in ("notes.txt", "checkpoint-mydata/p.txt", "checkpoint-²/p", "a/b")]
    for flags in ("", "--overwrite_output_dir true", "--resume_from_checkpoint auto --max_steps 3"):
        assert command("sft", flags).code == 0
        assert [path.read_text() for path in kept] == ["mine"] * len(kept)


def test_overwriting_deletes_what_the_run_made_and_leaves_what_came_later(command, tmp_path):
    out = tmp_path / "out"
    assert command("sft", "--save_steps 1").code == 0
    put(out, "policy/p.txt")
    outcome = command("sft", "--overwrite_output_dir true")
    assert outcome.code == 2 and "'policy'" in outcome.err and (out / "checkpoint-1").is_dir()
    shutil.rmtree(out / "policy")
    assert command("sft", "--overwrite_output_dir true --max_steps 1").code == 0
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("name", ["checkpoint-2", "adapter", "metrics.jsonl"])
def test_a_link_is_never_followed(name, command, tmp_path):
    assert command("sft").code == 0
    moved = shutil.move(tmp_path / "out" / name, tmp_path / "elsewhere")
    (tmp_path / "out" / name).symlink_to(moved)
    before = contents(tmp_path / "elsewhere") or (tmp_path / "elsewhere").read_bytes()
    outcome = command("sft", "--overwrite_output_dir true")
    assert outcome.code == 2 and f"'{name}'" in outcome.err
    assert (contents(tmp_path / "elsewhere") or (tmp_path / "elsewhere").read_bytes()) == before


def test_the_given_config_is_left_as_it_is(command, tmp_path):
    given = "# mine\nlearning_rate: 0.001\n"
    put(tmp_path, "out/config.yaml", given)
    flags = ["", "--resume_from_checkpoint auto --max_steps 3", "--overwrite_output_dir true"]
    for flag in flags:
        assert command("sft", f"--config out/config.yaml {flag}").code == 0
        assert (tmp_path / "out" / "config.yaml").read_text() == given
        assert "learning_rate: 0.001" in (tmp_path / "out" / "config.resolved.yaml").read_text()


def test_what_the_run_reads_is_not_replaced(command, tmp_path):
    assert command("sft").code == 0
    outcome = command("reward", "--sft_adapter out/adapter --overwrite_output_dir true")
    assert outcome.code == 2 and "--sft_adapter out/adapter is among what a run in out replaces" in outcome.err
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_a_report_above_the_folder_is_nobodys_but_a_whole_runs(command, tmp_path):
    put(tmp_path, "config.yaml", "learning_rate: 0.001\n")
    mine = put(tmp_path, "report.html")
    assert command("sft", "--output_dir sft").code == 0
    assert mine.read_text() == "mine" and (tmp_path / "sft" / "report.html").is_file()


def test_a_report_that_a_follower_wrote_is_not_in_the_runs_way(command, tmp_path, monkeypatch):
    real = Records.metrics

    def metrics(records, *line):
        real(records, *line)
        report([tmp_path / "out"])

    monkeypatch.setattr(Records, "metrics", metrics)
    assert command("sft", "--eval_size 0").code == 0
    assert command("sft", "--eval_size 0 --overwrite_output_dir true").code == 0


def test_a_run_of_a_version_without_marks_is_known(command, tmp_path):
    assert command("sft").code == 0
    for name in (".rlhf-fast.json", ".rlhf-fast.lock"):
        (tmp_path / "out" / name).unlink()
    mine = put(tmp_path / "out", "notes.txt")
    assert "out holds another run" in command("sft").err
    assert command("sft", "--resume_from_checkpoint auto --max_steps 3").code == 0
    (tmp_path / "out" / ".rlhf-fast.json").write_text("broken")
    assert command("sft", "--overwrite_output_dir true").code == 0
    assert mine.read_text() == "mine"


def test_a_finished_run_without_checkpoints_is_not_begun_anew(command, tmp_path):
    assert command("sft", "--save_steps 2").code == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    before = contents(tmp_path / "out" / "adapter")
    outcome = command("sft", "--resume_from_checkpoint auto")
    assert outcome.code == 2 and "holds a finished run and no whole checkpoint" in outcome.err
    assert contents(tmp_path / "out" / "adapter") == before


def test_one_run_a_folder_and_the_lock_dies_with_its_process(command, tmp_path):
    (tmp_path / "out").mkdir()
    script = (
        "import pathlib, sys, time; from rlhf_fast.recipes import lock;"
        "held = lock.hold(pathlib.Path('out'), print); print('held', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        for flags in ("", "--resume_from_checkpoint auto", "--overwrite_output_dir true"):
            outcome = command("sft", flags)
            assert outcome.code == 2
            assert f"out is in use by another run (process {process.pid} on " in outcome.err
    finally:
        process.kill()
        process.communicate()
    assert command("sft").code == 0


def test_a_file_system_without_locks_is_told(command, monkeypatch):
    real = fcntl.flock

    def flock(handle: int, operation: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".rlhf-fast.lock"):
            raise OSError(95, "Operation not supported")
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    outcome = command("sft")
    assert outcome.code == 0 and "out: no lock here (Operation not supported)" in outcome.err


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("dangling", "dangling is a link to 'nowhere', which is not there"),
        ("dangling/out", "dangling is a link to 'nowhere', which is not there"),
        ("x" * 300, "File name too long"),
        ("a\udcff", r"a\udcff: its name is not UTF-8 text"),
    ],
)
def test_a_place_that_cannot_be_a_folder(place, message, command, tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    outcome = command("sft", f"--output_dir {place}")
    assert outcome.code == 2 and message in outcome.err and len(outcome.err.splitlines()) == 1


def test_a_marker_cannot_name_what_lies_elsewhere(command, tmp_path):
    assert command("sft").code == 0
    mine = put(tmp_path, "mine.txt")
    path = tmp_path / "out" / ".rlhf-fast.json"
    note = json.loads(path.read_text())
    path.write_text(json.dumps(note | {"names": [*note["names"], "../mine.txt", "notes"]}))
    notes = put(tmp_path / "out", "notes")
    assert command("sft", "--overwrite_output_dir true").code == 0
    assert mine.read_text() == notes.read_text() == "mine"


def test_files_of_others_in_folders_of_a_run_stay(command, tmp_path):
    assert command("sft", "--save_steps 1 --save_total_limit 1").code == 0
    out = tmp_path / "out"
    places = [
        f"{name}/{file}"
        for name in ("adapter", "best", "checkpoint-2", "checkpoint-2/sft")
        for file in ("notes", "a/b")
    ]
    kept = [put(out, name) for name in places]
    (out / "adapter" / "link").symlink_to("nowhere")
    for flags in ("--resume_from_checkpoint auto --max_steps 4 --save_total_limit 1", "--overwrite_output_dir true"):
        assert command("sft", flags).code == 0
        assert [path.read_text() for path in kept] == ["mine"] * len(kept)
        assert (out / "adapter" / "link").is_symlink()
    assert not (out / "checkpoint-4").exists()  # nobody has put anything into it


def test_a_folder_that_a_run_replaces_holds_no_other_run(command):
    assert command("sft").code == 0
    for place in ("out/adapter", "out/adapter/new", "out/checkpoint-2/new"):
        outcome = command("sft", f"--output_dir {place}")
        assert outcome.code == 2 and "which a run made and may replace or delete" in outcome.err


def test_no_run_begins_anew_over_checkpoints_that_are_all_damaged(command, tmp_path):
    assert command("sft", "--save_steps 1").code == 0
    out = tmp_path / "out"
    (out / "summary.json").unlink()
    for path in out.glob("checkpoint-*/state.json"):
        path.write_text("{")
    (out / ".rlhf-fast.lock").unlink()  # it holds the time
    before = contents(out).keys()
    outcome = command("sft", "--resume_from_checkpoint auto")
    assert outcome.code == 2 and "holds checkpoints and none is whole (checkpoint-1, checkpoint-2)" in outcome.err
    assert contents(out).keys() - {".rlhf-fast.lock"} == before


def test_the_folder_of_a_run_of_another_kind_is_left_as_it_is(command, tmp_path):
    small = "--model_name_or_path tiny-random --batch_size 4 --max_steps 1 --max_length 64 --stages sft"
    assert command("run", f"{small} --sft.dataset_name sft.jsonl --output_dir w").code == 0
    before = contents(tmp_path / "w")
    for flags in ("", "--resume_from_checkpoint auto"):
        outcome = command("sft", f"--output_dir w {flags}")
        assert outcome.code == 2 and "w is the folder of `rlhf-fast run`, and this is `rlhf-fast sft`" in outcome.err
        outcome = command("reward", "--output_dir w/sft --resume_from_checkpoint auto")
        assert (
            outcome.code == 2
            and "w/sft is the folder of `rlhf-fast sft`, and this is `rlhf-fast reward`" in outcome.err
        )
        (tmp_path / "w" / "sft" / ".rlhf-fast.json").rename(tmp_path / "marker")  # as before there were any
        outcome = command("reward", "--output_dir w/sft --resume_from_checkpoint auto")
        assert (
            outcome.code == 2
            and "w/sft is the folder of `rlhf-fast sft`, and this is `rlhf-fast reward`" in outcome.err
        )
        (tmp_path / "marker").rename(tmp_path / "w" / "sft" / ".rlhf-fast.json")
        outcome = command("run", f"{small} --sft.dataset_name sft.jsonl --output_dir w/sft {flags}")
        assert (
            outcome.code == 2 and "w/sft is the folder of `rlhf-fast sft`, and this is `rlhf-fast run`" in outcome.err
        )
    assert contents(tmp_path / "w") == before


def test_the_folder_of_the_data_is_no_output_folder(command, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "sft.jsonl", tmp_path / "data" / "sft.jsonl")
    outcome = command("sft", "--dataset_name data --output_dir ./data")
    assert outcome.code == 2 and "--dataset_name data is --output_dir itself" in outcome.err
    assert os.listdir(tmp_path / "data") == ["sft.jsonl"]


@pytest.mark.parametrize("name", [".rlhf-fast.json", ".rlhf-fast.lock"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_name_that_runs_keep_files_under_and_is_none(name, make, command, tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    outcome = command("sft")
    assert outcome.code == 2 and f"out/{name} is no plain file" in outcome.err and "move it away" in outcome.err


def test_a_pipe_where_a_file_should_be_is_not_waited_for(command, tmp_path):
    assert command("sft", "--save_steps 1").code == 0
    out = tmp_path / "out"
    (out / "checkpoint-2" / "manifest.json").unlink()
    os.mkfifo(out / "checkpoint-2" / "manifest.json")
    outcome = command("sft", "--resume_from_checkpoint auto")
    assert outcome.code == 0 and "manifest.json cannot be read: it is no plain file" in outcome.err
    (out / ".rlhf-fast.json").unlink()
    (out / "config.yaml").unlink()
    os.mkfifo(out / "config.yaml")
    outcome = command("sft", "--resume_from_checkpoint auto")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1


def test_a_lock_file_that_is_somebody_elses_is_not_written(command, tmp_path):
    lock = put(tmp_path / "out", ".rlhf-fast.lock")
    assert "is no lock file that a run made" in command("sft").err and lock.read_text() == "mine"
    lock.unlink()
    mine = put(tmp_path, "mine.txt", "")
    os.link(mine, lock)
    assert command("sft").code == 2 and mine.read_text() == ""


def test_a_lock_does_not_outlive_its_run_in_a_child(tmp_path):
    script = (
        "import os, pathlib, time; from rlhf_fast.recipes import lock;"
        "held = lock.hold(pathlib.Path('.'), print);"
        "child = os.fork() or time.sleep(600); print(child, flush=True); os._exit(0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.wait()
        end = time.monotonic() + 30  # the child lets go as soon as it runs, which may be after its parent's end
        while time.monotonic() < end:
            with contextlib.suppress(UserError):
                folder_lock.check_free(tmp_path)
                break
            time.sleep(0.01)
        folder_lock.check_free(tmp_path)
    finally:
        os.kill(child, 9)


def test_a_lock_that_a_child_holds_names_it(tmp_path, monkeypatch):
    def gone(process: int, number: int) -> None:
        raise ProcessLookupError

    held = folder_lock.hold(tmp_path, print)
    monkeypatch.setattr(folder_lock, "_held", {})
    monkeypatch.setattr(os, "kill", gone)
    with pytest.raises(UserError, match=f"a child of process {os.getpid()} on .*, which has ended itself"):
        folder_lock.check_free(tmp_path)
    held.release()
