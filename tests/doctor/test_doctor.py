"""`rlhf-fast doctor`: findings on the terminal and as JSON, exit codes, and nothing written."""

import json
from pathlib import Path

import pytest
import yaml
from command_lines import write_jsonl
from sound_stages import TINY, chat

from rlhf_fast.cli import main

ROOT = Path(__file__).parents[2]


def test_the_tiny_example_has_no_error_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", str(ROOT / "examples" / "tiny.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {one["level"] for one in found} <= {"ok", "note", "warning"}
    assert {one["stage"] for one in found} == {"", "sft", "reward", "ppo"}
    assert all(one.keys() >= {"name", "level", "found", "why", "change"} for one in found)
    assert all((one["why"] == "") == (one["level"] == "ok") for one in found)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sft_yaml(tmp_path, monkeypatch):
    """``sft_yaml(**settings)`` writes sft.yaml, of data whose text turns a terminal's direction round."""
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": chat(f"\u202eq{i}") + chat("a", "assistant")} for i in range(40)]
    write_jsonl(tmp_path / "chats.jsonl", rows)

    def write(**settings):
        content = TINY | {"batch_size": 16, "max_steps": 10, "dataset_name": "chats.jsonl", "output_dir": "out"}
        Path("sft.yaml").write_text(yaml.safe_dump(content | {"patience": 2} | settings))

    return write


def test_exit_codes_and_strict(sft_yaml, capsys):
    sft_yaml(eval_size=0)
    assert main(["doctor", "sft.yaml"]) == 0
    out = capsys.readouterr().out
    assert "sft trained_tokens" in out and "\u202e" not in out and "\\u202e" in out
    assert main(["doctor", "sft", "--config", "sft.yaml", "--strict"]) == 4
    outcome = capsys.readouterr()
    assert "Change: Set --eval_size" in outcome.out and outcome.err.splitlines()[-1].endswith("sft held_out")
    sft_yaml(dataset_name="none.jsonl")
    assert main(["doctor", "sft.yaml", "--json"]) == 4
    findings = json.loads(capsys.readouterr().out)["findings"]
    (bad,) = [one for one in findings if one["level"] == "error"]
    assert bad["name"] == "data" and "none.jsonl: no such file" in bad["found"]


def test_a_file_that_fits_several_stages_must_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("some.yaml").write_text("lora_r: 4\n")
    assert main(["doctor", "some.yaml"]) == 2
    assert "its settings are of sft or reward or dpo or ppo; name the stage" in capsys.readouterr().err
    assert main(["doctor", "what"]) == 2
    assert main(["doctor", "--help"]) == 0
