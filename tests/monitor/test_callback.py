"""The monitor as a callback of transformers."""

import subprocess
import sys
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from rlhf_fast.monitor.callback import MonitorCallback
from rlhf_fast.verdicts import Verdict

FOUND = Verdict("kl_explosion", 4, 5, 0.875, ["objective/kl"], [], "KL rose to 40\x1b[2J", "Raise kl_coef.")


class Watch:
    """A monitor that finds something at step 5 and fails at step 9."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, float]]] = []

    def update(self, step: int, metrics: Any, samples: Any = ()) -> list[Verdict]:
        self.calls.append((step, dict(metrics)))
        if step == 9:
            raise RuntimeError("no\nmemory")
        return [FOUND] if step == 5 else []


def log(callback: MonitorCallback, step: int, *logs: dict[str, Any], first: bool = True) -> bool:
    """Logs at a step, and begins the next one; whether the trainer is to stop."""
    control = TrainerControl()
    state = TrainerState(global_step=step, is_world_process_zero=first)
    for each in logs:
        callback.on_log(None, state, control, logs=each)  # type: ignore[arg-type]
    callback.on_step_begin(None, state, control)  # type: ignore[arg-type]
    return control.should_training_stop


def test_logs_reach_the_monitor_under_our_names_and_verdicts_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    watch, acted = Watch(), []
    callback = MonitorCallback(watch, actions=[acted.append])
    grpo = {"kl": 0.5, "completions/mean_length": 20.0, "reward": float("nan"), "learning_rate": 0.1, "note": "text"}
    assert not log(callback, 4, grpo) and not log(callback, 5, {"loss": 1.0, "epoch": 1}, {"eval_reward": 0.5})
    assert not log(callback, 5) and not log(callback, 6, grpo, first=False)
    assert watch.calls == [
        (4, {"objective/kl": 10.0, "response/length_mean": 20.0, "lr": 0.1}),
        (5, {"loss": 1.0, "epoch": 1.0, "eval/scores": 0.5}),
    ]
    assert acted == [FOUND]
    told = capsys.readouterr().err
    assert told == ("rlhf-fast: KL explosion since step 4 (confidence 88%): KL rose to 40\\x1b[2J. Raise kl_coef.\n")


def test_a_verdict_stops_the_training_where_that_is_asked_for() -> None:
    callback = MonitorCallback(Watch(), stop=True)
    assert [log(callback, step, {"loss": 1.0}) for step in (4, 5, 6)] == [False, True, False]


def test_a_monitor_or_an_action_that_fails_is_told_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch()
    callback = MonitorCallback(watch, stop=True)
    assert not log(callback, 9, {"loss": 1.0}) and not log(callback, 10, {"loss": 1.0})
    line = "rlhf-fast: the monitor failed at step 9 and is off from now on: RuntimeError: no memory\n"
    assert capsys.readouterr().err == line and len(watch.calls) == 1

    def fail(verdict: Any) -> None:
        raise OSError("no network")

    callback = MonitorCallback(Watch(), actions=[fail], stop=True)
    assert log(callback, 5, {"loss": 1.0}) and log(callback, 5, {"loss": 1.0})
    line = "rlhf-fast: an action of the monitor failed at step 5 and is off from now on: OSError: no network"
    assert capsys.readouterr().err.splitlines()[1::2] == [line]


def test_the_rest_of_the_monitor_starts_without_transformers() -> None:
    script = "import sys, rlhf_fast.monitor; sys.exit(bool({'torch', 'transformers', 'textual'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
