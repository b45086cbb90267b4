"""The bench of whole training steps: our rows as `make bench-step` runs them, and tables from figures set by hand."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.bench.step import __main__ as step
from rlhf_fast.bench.step import arithmetic, process, runs, tables, work
from rlhf_fast.bench.step.contest import ROWS
from rlhf_fast.models.builtin import tiny_model


def call(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.step", "--model", str(tiny_model()), *flags])
    step.main()


# ---- as a user runs it ---------------------------------------------------------------------------------------------


def test_a_quick_run_measures_our_rows_and_names_the_peers_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "step.json"
    monkeypatch.setitem(runs.PYTHON, "trl", runs.ROOT / ".venv-nowhere" / "bin" / "python")
    call(monkeypatch, "--quick", "--rounds", "1", "--json", str(figures), "--only", "ours-bf16-4,trl-bf16-4")
    results = json.loads(figures.read_text())
    assert results["quick"] is True and results["failed"] == {} and set(results["versions"]) == {"rlhf-fast"}
    assert results["missing"] == {"trl-bf16-4": "no trl in .venv-nowhere/bin/python"}
    assert results["peaks"].keys() == {"bfloat16", "float32"} and min(results["peaks"].values()) > 0
    (run,) = results["runs"]
    assert run["key"] == "ours-bf16-4" and run["dtype"] == "bfloat16" and run["round"] == 1
    (seconds,) = run["seconds"]
    phases = [run["phases"][phase] for phase in ("rollout", "score", "update")]
    assert all(len(each) == 1 and each[0] > 0 for each in phases) and sum(each[0] for each in phases) <= seconds
    assert run["response_tokens"] == [4 * 8]  # no stop token ends a response
    assert 0.1 < run["peak_memory_gb"] < 5
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[0]) == run
    assert "| rlhf-fast, micro-batch 4 | bf16 |" in out and "- trl-bf16-4: no trl in" in out and "Quick sizes" in out


def test_a_row_that_fails_is_told_and_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "peer.py"
    script.write_text("import sys\nprint('one line')\nsys.exit('it broke')")
    monkeypatch.setitem(runs.PYTHON, "trl", Path(sys.executable))
    monkeypatch.setitem(runs.PEERS, "trl", (str(script), True))
    monkeypatch.setattr(step, "versions", lambda python: {})
    with pytest.raises(SystemExit):
        call(monkeypatch, "--quick", "--rounds", "2", "--only", "trl-bf16-4")
    out = capsys.readouterr().out
    assert out.count('{"key": "trl-bf16-4", "failed": "it broke"}') == 1 and "- trl-bf16-4: it broke" in out


def test_rows_are_listed_and_an_unknown_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "--list")
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [row.key for row in ROWS] and len(set(listed)) == len(listed)
    with pytest.raises(SystemExit, match="--only: there is no row 'nobody'; there are trl-four-bf16-4, trl-bf16-4"):
        call(monkeypatch, "--list", "--only", "trl-bf16-4,nobody")


# ---- the work ------------------------------------------------------------------------------------------------------


def test_transcripts_become_questions_prompts_and_answers(tmp_path: Path) -> None:
    said = "\n\nHuman: Hi there\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    rows = [
        {"chosen": f"{said} Because.", "rejected": f"{said} No idea."},
        {"chosen": f"{said} Because.", "rejected": "\n\nHuman: Hi there\n\nAssistant: other turns"},
        {"chosen": f"{said} Same.", "rejected": f"{said} Same."},
    ]
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {"question": "Hi there", "prompt": said, "chosen": " Because.", "rejected": " No idea."}
    assert list(work.read_pairs(path)) == [expected]


def test_prepared_files_hold_one_batch_within_the_lengths(tmp_path: Path) -> None:
    wanted = work.quick(str(tiny_model()))
    path = work.prepare(wanted, None, tmp_path)
    written = json.loads(path.read_text())
    prompts, pairs = ([json.loads(line) for line in Path(written[name]).open()] for name in ("prompts", "reward"))
    lengths = [len(row["prompt"].encode()) for row in prompts]  # the tiny model's tokens are bytes
    assert len(prompts) == len(pairs) == 4 and min(lengths) >= 8 and max(lengths) <= 96
    assert written["tokens"]["prompts"] == sum(lengths) and written["tokens"]["responses"] == 4 * 8
    sides = [len((row["prompt"] + row[side]).encode()) + 1 for side in ("chosen", "rejected") for row in pairs]
    assert written["tokens"]["reward"] == sum(sides) and max(sides) <= 256
    # 4 heads of 16 and 2 of keys and values on 64 hidden units; an MLP of 128
    assert written["shape"] == {
        "layer": 64 * 16 * 2 * (4 + 2) + 3 * 64 * 128,
        "layers": 4,
        "hidden": 64,
        "vocabulary": 320,
    }


def test_too_few_rows_of_the_right_length_are_refused() -> None:
    assert work.spread("abcdef", 3, "x") == ["a", "c", "e"]
    with pytest.raises(
        SystemExit, match=r"hh.jsonl: 2 rows have the wanted length, and a batch needs 3; name other --data"
    ):
        work.spread("ab", 3, "hh.jsonl")


# ---- a process -----------------------------------------------------------------------------------------------------


def test_peak_memory_counts_children(tmp_path: Path) -> None:
    hold = "held = bytearray(300_000_000); import time; time.sleep(1.5)"
    alone = process.run([sys.executable, "-c", hold], tmp_path / "a.log", os.environ, 60)
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}"
    both = process.run([sys.executable, "-c", code], tmp_path / "b.log", os.environ, 60)
    assert 0.3 < alone < 0.36 and 0.6 < both < 0.72


def test_a_failed_process_gives_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(process.Failed, match="^ValueError: wrong$"):
        process.run([sys.executable, "-c", "raise ValueError('wrong')"], tmp_path / "a.log", os.environ, 60)


def test_a_process_that_hangs_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(process.Failed, match="stopped after 0.3 s"):
        process.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "a.log", os.environ, 0.3)


# ---- figures -------------------------------------------------------------------------------------------------------

WORK: dict[str, Any] = {
    "model": "some-model",
    "data": "hh.jsonl",
    "batch_size": 2,
    "prompt_tokens": [8, 32],
    "response_length": 30,
    "ppo_epochs": 4,
    "max_length": 128,
    "train_micro_batch": 8,
    "lora_r": 16,
    "tokens": {"prompts": 40, "responses": 60, "sft": 200, "sft_trained": 120, "reward": 400},
    "shape": {"layer": 1000, "layers": 10, "hidden": 10, "vocabulary": 500},
}


def test_flop_by_hand() -> None:
    # 100 tokens through 10,000 weights; 60 response tokens through a head of 5,000
    assert arithmetic.flop("ppo", WORK) == {
        "rollout": 2 * 100 * 10_000 + 2 * 60 * 5_000,
        "score": 4 * 2 * 100 * 10_000 + 2 * 2 * 60 * 5_000,
        "update": 4 * (2 * 4 * 100 * 10_000 + 4 * 60 * 5_000),
    }
    # 2 of 10 layers have adapters: the 8 below run once for the four roles, and not at all in the update
    assert arithmetic.flop("ppo", WORK, 2) == {
        "rollout": 2 * 100 * 10_000 + 2 * 60 * 5_000,
        "score": 2 * 100 * (8_000 + 4 * 2_000) + 2 * 2 * 60 * 5_000,
        "update": 4 * (2 * 4 * 100 * 2_000 + 4 * 60 * 5_000),
    }
    assert arithmetic.flop("sft", WORK) == {"step": 200 * 4 * 10_000 + 4 * 120 * 5_000}
    assert arithmetic.flop("reward", WORK) == {"step": 400 * 4 * 10_000}
    assert arithmetic.flop("rollout", WORK) == {"step": 2 * 100 * 10_000 + 2 * 60 * 5_000}


def run(key: str, who: str, stage: str, seconds: list[float], gb: float, **more: Any) -> dict[str, Any]:
    names = {"trl": "TRL", "rlhf-fast": "rlhf-fast", "peft": "generate of transformers"}
    tokens = [60] * len(seconds) if stage in ("ppo", "rollout") else []
    base = {"key": key, "name": names[who], "stage": stage, "who": who, "dtype": "bfloat16", "memory": None}
    base |= {"speed": True, "flags": {}, "round": 1, "seconds": seconds, "phases": {}, "response_tokens": tokens}
    return {**base, "peak_memory_gb": gb, **more}


def results() -> dict[str, Any]:
    phases = [
        {"rollout": [9.0, 0.5], "score": [9.0, 0.5], "update": [9.0, 1.0]},
        {"rollout": [9.0, 0.5], "score": [9.0, 0.5], "update": [9.0, 3.0]},
    ]
    flags = {"micro_batch_size": "4"}
    return {
        "machine": {"cpu": "Some CPU", "cores": 2, "load_before": 0.25},
        "versions": {"rlhf-fast": {"torch": "2.13.0"}, "trl": {"torch": "2.12.0", "trl": "1.12.0"}},
        "quick": False,
        "work": WORK,
        "peaks": {"bfloat16": 1e8, "float32": 5e7},
        "runs": [
            run("trl-bf16-4", "trl", "ppo", [99.0, 10.0], 4.0, memory="policy and reference on one base (TRL)"),
            run("trl-bf16-16", "trl", "ppo", [99.0, 12.0], 3.0),
            run("ours", "rlhf-fast", "ppo", [99.0, 2.0], 1.0, flags=flags, phases=phases[0], memory="all roles"),
            run(
                "ours", "rlhf-fast", "ppo", [99.0, 4.0], 1.2, flags=flags, phases=phases[1], memory="all roles", round=2
            ),
            run("hidden", "rlhf-fast", "ppo", [99.0, 5.0], 2.5, memory="more", speed=False),
            run("trl-sft", "trl", "sft", [9.0, 4.0], 3.0),
            run("ours-sft", "rlhf-fast", "sft", [9.0, 1.0], 1.5),
            run("peft", "peft", "rollout", [9.0, 2.0], 1.0),
        ],
        "failed": {"agilerl": "it broke"},
        "missing": {},
    }


def test_tables_by_hand() -> None:
    text = tables.tables(results())
    where, *rest = text.split("\n\n")
    assert where.startswith(
        "2 cores of Some CPU; torch 2.13.0, trl 1.12.0. Load of the machine before the first run: 0.2."
    )
    assert "2 prompts of 8 to 32 tokens (40 in all)" in where and "bf16 0 GFLOP/s" in where and "Quick" not in where
    body = dict(zip(rest[::2], rest[1::2], strict=False))
    # ours: 3 s, the median of 2 and 4; 60 tokens in 3 s against 60 in 10 s; rollout 2.6 MFLOP at 100 MFLOP/s in 0.5 s
    assert body["**A step of PPO**"].splitlines()[2:] == [
        "| TRL | bf16 | 10.00 | 6.0 |  | 4.00 GB |  |  |  |",
        "| TRL | bf16 | 12.00 | 5.0 |  | 3.00 GB |  |  |  |",
        "| rlhf-fast, micro-batch 4 | bf16 | 3.00 | 20.0 | 3.33x | 1.20 GB | 40% | "
        "rollout 0.50, scoring 0.50, update 2.00 | rollout 5%, scoring 18%, update 18% |",
    ]
    assert body["**What sharing saves, at the same batch**"].splitlines()[2:] == [
        "| policy and reference on one base (TRL) | bf16 | 4.00 GB | 10.00 |",
        "| all roles | bf16 | 1.20 GB | 3.00 |",
        "| more | bf16 | 2.50 GB | 5.00 |",
    ]
    assert body["**Sampling alone**"].splitlines()[2:] == [
        "| generate of transformers | bf16 | 2.00 | 30.0 |  |",
        "| rlhf-fast, micro-batch 4: its rollout | bf16 | 0.50 | 120.0 | 4.00x |",
    ]
    assert body["**A step of SFT and of reward training**"].splitlines()[2:] == [
        "| sft | TRL | bf16 | 4.00 | 50 |  | 3.00 GB |  |  |",
        "| sft | rlhf-fast | bf16 | 1.00 | 200 | 4.00x | 1.50 GB | 50% | 10% |",
    ]
    assert text.endswith("\n\n- agilerl: it broke")


def test_without_a_peer_there_are_no_ratios() -> None:
    alone = results()
    alone["runs"] = [run for run in alone["runs"] if run["key"] == "ours"][:1]
    assert "| 30.0 |  | 1.00 GB |  |" in tables.tables(alone)
