"""The monitor's interface: what goes in, what a verdict says, the command. Detection is held to recorded runs in
test_corpus.py."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_fast import verdicts
from rlhf_fast.cli import main
from rlhf_fast.errors import UserError
from rlhf_fast.monitor import Monitor, as_json, read_verdicts, watch, write_verdicts

QUIET = {"objective/kl_target": 2.0, "response/length_mean": 20.0}


def exploding(step: int) -> dict[str, float]:
    return QUIET | {"objective/kl": 1.0 if step < 10 else 50.0}


def samples(step: int) -> list[dict]:
    return [
        {"prompt": f"p{index}", "response": f"r{index}", "score": 0.0, "kl": float(index + step)} for index in range(5)
    ]


def test_a_verdict_is_told_once_and_grows():
    monitor = Monitor()
    told = [[verdict.name for verdict in monitor.update(step, exploding(step), samples(step))] for step in range(1, 16)]
    assert told == [[]] * 10 + [["kl_explosion"]] + [[]] * 4  # the second step above the limit
    (verdict,) = monitor.verdicts
    assert (verdict.first_step, verdict.last_step) == (10, 15)
    assert verdict.confidence > 0.9 and verdict.metrics[0] == "objective/kl"
    assert "50 nats" in verdict.reason and verdict.advice


def test_the_samples_are_the_worst_since_it_began_each_prompt_once():
    monitor = watch([{"step": step, **exploding(step)} for step in range(1, 12)])
    assert monitor.verdicts[0].samples == []
    rows = [{"step": step, **sample} for step in range(1, 12) for sample in samples(step)]
    monitor = watch([{"step": step, **exploding(step)} for step in range(1, 12)], rows)
    assert [(sample["step"], sample["prompt"]) for sample in monitor.verdicts[0].samples] == [
        (11, "p4"),
        (11, "p3"),
        (11, "p2"),
    ]


def test_gaps_and_texts_are_left_out():
    monitor = Monitor()
    for step in range(1, 30):
        line = exploding(1) | {"objective/kl": [1.0, math.nan, None, "broken", math.inf, True][step % 6]}
        assert monitor.update(step, line) == []


def test_a_sample_that_cannot_show_it_is_not_among_the_worst():
    rows = [{"step": step, **exploding(step)} for step in range(1, 12)]
    texts = [{"step": 11, "prompt": "with", "kl": 3.0}, {"step": 11, "prompt": "without"}, {"prompt": "no step"}]
    assert [sample["prompt"] for sample in watch(rows, texts).verdicts[0].samples] == ["with"]


def test_logs_with_holes():
    """Scores at every second step alone, and a target of 0."""
    monitor = Monitor()
    for step in range(1, 45):
        scores = {"objective/scores": 1.0} if step % 2 else {}
        monitor.update(step, {"objective/kl": 0.001, "objective/kl_target": 0.0, **scores})
    assert [verdict.name for verdict in monitor.verdicts] == ["not_learning"]


def test_tensors_and_numpy_numbers_are_numbers():
    for kind in (torch.tensor, np.float32):
        monitor = Monitor()
        for step in range(1, 12):
            monitor.update(step, {name: kind(value) for name, value in exploding(step).items()})
        assert [verdict.name for verdict in monitor.verdicts] == ["kl_explosion"]


def test_steps_go_forward():
    monitor = Monitor()
    monitor.update(3, {})
    with pytest.raises(UserError, match="a step above 3; got 3"):
        monitor.update(3, {})


@pytest.mark.parametrize(
    "thresholds, said",
    [
        ({"kl_over_targets": 5}, "no threshold of the monitor is called 'kl_over_targets'.*kl_over_target"),
        ({"window": 1}, "window must be a whole number from 2 on; got 1"),
        ({"patience": 20.5}, "patience must be a whole number from 4 on; got 20.5"),
        ({"reward_std": 1}, "reward_std must be a number above 1; got 1"),
        ({"z": math.nan}, "z must be a number above 0; got nan"),
        ({"z": "3"}, "z must be a number above 0; got '3'"),
    ],
)
def test_wrong_thresholds(thresholds, said):
    with pytest.raises(UserError, match=said):
        Monitor(thresholds)


def test_thresholds_can_be_set():
    rows = [{"step": step, **exploding(step)} for step in range(1, 16)]
    assert watch(rows, thresholds={"kl_over_target": 26, "kl_jump": 60}).verdicts == []


def test_the_file_gives_back_what_was_written(tmp_path):
    found = watch([{"step": step, **exploding(step)} for step in range(1, 12)]).verdicts
    write_verdicts(tmp_path, found)
    assert read_verdicts(tmp_path) == found
    for changes in ({"name": "unheard_of"}, {"first_step": "a"}, {"samples": [1]}, {"more": 1}):
        entries = as_json(found)["verdicts"]
        (tmp_path / "verdicts.json").write_text(json.dumps({"verdicts": [{**entries[0], **changes}]}))
        with pytest.raises(UserError, match="verdicts.json: expected"):
            read_verdicts(tmp_path)


def write_run(folder: Path) -> None:
    (folder / "ppo").mkdir()
    rows = [{"step": step, **exploding(step)} for step in range(1, 16)]
    texts = [{"step": 12, "prompt": "p", "response": "\x1b[31mred\u202e [bold]", "score": 1.0, "kl": 9.0}]
    for name, lines in (("metrics", rows), ("samples", texts)):
        (folder / "ppo" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_command_says_what_it_found(tmp_path, capsys):
    write_run(tmp_path)
    for place in (tmp_path, tmp_path / "ppo", tmp_path / "ppo" / "metrics.jsonl"):
        assert main(["monitor", str(place)]) == 3
        said = capsys.readouterr().out
        assert "KL explosion (kl_explosion), steps 10 to 15" in said
        assert r"\x1b[31mred\u202e [bold]" in said and "\x1b" not in said
    assert main(["monitor", str(tmp_path), "--json"]) == 3
    (entry,) = json.loads(capsys.readouterr().out)["verdicts"]
    assert entry.pop("stage") == "ppo"
    assert [entry] == json.loads(json.dumps(as_json(watch_ppo(tmp_path))))["verdicts"]
    assert main(["monitor", str(tmp_path), "--kl_over_target", "26", "--kl_jump", "60"]) == 0
    log = tmp_path / "ppo" / "metrics.jsonl"
    assert capsys.readouterr().out == f"{log} (rlhf-fast): 15 logged steps\nnothing found\n"
    (tmp_path / "ppo" / "config.yaml").write_text("monitor_thresholds: {kl_over_target: 26, kl_jump: 60}\n")
    assert main(["monitor", str(tmp_path)]) == 0  # the run's own thresholds
    assert main(["monitor", str(tmp_path), "--kl_over_target", "3"]) == 3


def watch_ppo(folder: Path) -> list[verdicts.Verdict]:
    lines = {
        name: [json.loads(line) for line in (folder / "ppo" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "samples")
    }
    return watch(lines["metrics"], lines["samples"]).verdicts


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "nowhere does not exist: give a run's folder"),
        (["."], "expected a run or stage folder"),
        ([], "RUN_OR_LOG"),
        ([".", "--z", "high"], "--z must be a number; got 'high'"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["monitor", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_docs_list_the_verdicts():
    path = Path(__file__).parents[2] / "docs" / "verdicts.md"
    assert path.read_text() == verdicts.markdown(), "python -m rlhf_fast.verdicts > docs/verdicts.md"
