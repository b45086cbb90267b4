"""What lies in an output folder and no run made is never deleted or replaced; one run a folder at a time."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
