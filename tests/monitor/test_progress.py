import io
import sys

import pytest

from rlhf_fast.monitor import progress
from rlhf_fast.monitor.progress import Progress, clock


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(progress, "monotonic", fake)
    return fake


def test_plain_lines_are_the_first_the_last_and_one_every_ten_seconds(
    time: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("ppo", 40) as bar:
        for step in range(1, 41):
            time.now += 1.0
            bar.update(step, loss=f"{step / 10:.3f}", speed="512 tok/s")
        out, err = capsys.readouterr()  # the last line is printed before the end of the stage
    assert capsys.readouterr().err == ""  # nor is it printed twice
    assert out == ""  # standard output is for results
    assert err.splitlines() == [
        "ppo  1/40  loss 0.100  512 tok/s  left 0:39",
        "ppo  11/40  loss 1.100  512 tok/s  left 0:29",
        "ppo  21/40  loss 2.100  512 tok/s  left 0:19",
        "ppo  31/40  loss 3.100  512 tok/s  left 0:09",
        "ppo  40/40  loss 4.000  512 tok/s",
    ]


def test_time_left_counts_from_where_a_resumed_run_began(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("sft", 100, start=90) as bar:
        bar.update(90)
        time.now += 20.0
        bar.update(92, loss="1.5")
        time.now += 80.0
        bar.update(100)
    assert capsys.readouterr().err.splitlines() == [
        "sft  90/100",
        "sft  92/100  loss 1.5  left 1:20",
        "sft  100/100  loss 1.5",
    ]


def test_a_stage_that_ends_early_prints_where_it_stopped(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Progress("sft", 10) as bar:
        bar.update(1)
        time.now += 2.0
        bar.update(4)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines() == ["sft  1/10  left 0:00", "sft  4/10  left 0:03"]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("ppo", 2, enabled=False) as bar:
        bar.update(1, loss="1")
        bar.say("nothing")
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_say_prints_the_message_unwrapped_and_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    message = "[bold]saved[/bold] to " + "a/long/path/" * 20
    with Progress("ppo", 2) as bar:
        bar.say(message)
    assert capsys.readouterr().err == f"{message}\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_say_does_not_tear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("ppo", 40) as bar:
        bar.update(12, loss="[1.234]", speed="512 tok/s")
        bar.say("saved checkpoint-12")
    shown = terminal.getvalue()
    assert "12/40" in shown and "loss [1.234]  512 tok/s" in shown and "left" in shown
    assert "saved checkpoint-12\n" in shown
    assert "ppo  12/40" not in shown  # no plain lines in addition to the bar


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (190, "3:10"), (3725, "1:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
