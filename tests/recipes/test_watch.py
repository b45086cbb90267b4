"""The monitor in a running stage: verdicts are written, actions act, and a monitor that fails ends nothing."""

import json
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.monitor import detectors, read_verdicts
from rlhf_fast.monitor.detectors import Finding
from rlhf_fast.recipes import ppo, reward


@pytest.fixture
def found_at(monkeypatch):
    """``found_at(step)``: a monitor that once finds a KL explosion at one step, as having begun there."""

    def set_step(step: int, times: int = 1) -> None:
        left = [None] * times

        def detector(history, at):
            if history.step == step and left:
                left.pop()
                return Finding(step, 3.0, ["objective/kl"], "made up", lambda row: 0.0)

        for name in detectors.DETECTORS:
            monkeypatch.setitem(detectors.DETECTORS, name, lambda history, at: None)
        monkeypatch.setitem(detectors.DETECTORS, "kl_explosion", detector)

    return set_step


def trained_lines(config) -> list[dict]:
    """The lines of the training steps."""
    ppo.train(config)
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


def steps_of(lines: list[dict]) -> list[int]:
    return [line["step"] for line in lines]


def acting(action: str) -> dict:
    return {"monitor_actions": {"kl_explosion": action}, "warmup_ratio": 0.0}


def test_told_and_written_without_an_action(ppo_config, found_at, capfd):
    found_at(3)
    config = ppo_config()
    assert steps_of(trained_lines(config)) == [1, 2, 3, 4]
    (verdict,) = read_verdicts(Path(config.output_dir))
    assert (verdict.name, verdict.first_step, verdict.last_step) == ("kl_explosion", 3, 3)
    assert "monitor: KL explosion since step 3" in capfd.readouterr().err


def test_stop(ppo_config, found_at):
    found_at(3)
    config = ppo_config(**acting("stop"))
    assert steps_of(trained_lines(config)) == [1, 2, 3]
    folder = Path(config.output_dir)
    assert (folder / "checkpoint-3").is_dir() and (folder / "policy").is_dir()
    stopped = json.loads((folder / "summary.json").read_text())["figures"]["stopped_by_monitor"]
    assert stopped == {"value": "after step 3 of 4", "note": "KL explosion"}


def test_a_lower_learning_rate_holds_in_a_resumed_run(ppo_config, found_at):
    found_at(2)
    config = ppo_config(**acting("lower_learning_rate"))
    first = trained_lines(config)
    assert [line["lr"] for line in first] == [1e-2, 1e-2, 5e-3, 5e-3]
    config.resume_from_checkpoint = str(Path(config.output_dir) / "checkpoint-2")
    assert [line["lr"] for line in trained_lines(config)] == [1e-2, 1e-2, 5e-3, 5e-3]


def test_raise_kl_coef(ppo_config, found_at):
    found_at(2)
    lines = trained_lines(ppo_config(**acting("raise_kl_coef"), kl_target=None))
    assert [line["objective/kl_coef"] for line in lines] == [0.05, 0.05, 0.1, 0.1]


def test_roll_back(ppo_config, found_at):
    found_at(4)
    config = ppo_config(**acting("roll_back"), max_steps=5)
    lines = trained_lines(config)
    assert steps_of(lines) == [1, 2, 3, 4, 5]
    assert [line["lr"] for line in lines] == [1e-2, 1e-2, 5e-3, 5e-3, 5e-3]  # steps 3 and 4 once more
    assert [verdict.first_step for verdict in read_verdicts(Path(config.output_dir))] == [4]  # though the log is cut


def test_roll_back_ends(ppo_config, found_at, capfd):
    found_at(4, times=9)
    lines = trained_lines(ppo_config(**acting("roll_back"), max_steps=5))
    assert [line["lr"] for line in lines] == [1e-2, 1e-2, 1.25e-3, 1.25e-3]
    assert "rolled back 3 times" in capfd.readouterr().err


def test_roll_back_without_a_checkpoint_stops(ppo_config, found_at, capfd):
    found_at(2)
    assert steps_of(trained_lines(ppo_config(**acting("roll_back"), save_steps=10))) == [1, 2]
    assert "no checkpoint from before it" in capfd.readouterr().err


def test_a_monitor_that_fails_ends_nothing(ppo_config, monkeypatch, capfd):
    def broken(history, at):
        raise ZeroDivisionError("made up")

    told = "switched off by an error of its own: ZeroDivisionError: made up"
    monkeypatch.setitem(detectors.DETECTORS, "kl_explosion", broken)
    config = ppo_config()
    assert len(trained_lines(config)) == 4
    assert capfd.readouterr().err.count(told) == 1
    config.resume_from_checkpoint = str(Path(config.output_dir) / "checkpoint-2")
    assert len(trained_lines(config)) == 4  # it fails on the log of the first steps too
    assert capfd.readouterr().err.count(told) == 1


def test_a_stopped_reward_model_is_judged_as_it_is_saved(reward_config, monkeypatch):
    def detector(history, at):
        return Finding(2, 3.0, ["loss"], "made up", lambda row: 0.0) if history.step == 2 else None

    monkeypatch.setitem(detectors.DETECTORS, "not_learning", detector)
    config = reward_config(monitor_actions={"not_learning": "stop"}, eval_steps=3)
    reward.train(config)
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [0, 2]


@pytest.mark.parametrize(
    "actions, said",
    [
        ({"kl_explosions": "stop"}, "no verdict 'kl_explosions' .did you mean 'kl_explosion'"),
        ({"kl_explosion": "panic"}, "no action 'panic'; there are stop, lower_learning_rate, roll_back, raise_kl_coef"),
    ],
)
def test_unknown_actions_are_refused(ppo_config, actions, said):
    with pytest.raises(UserError, match=said):
        ppo.train(ppo_config(monitor_actions=actions))
