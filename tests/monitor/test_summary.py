import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.monitor.summary import print_summary, read_summary, write_summary


def test_figures_and_curves_are_written_apart(tmp_path: Path) -> None:
    figures = {
        "loss": math.nan,
        "accuracy": {"value": 0.7, "low": 0.6, "high": math.inf},
        "reliability": [{"count": 3}],
    }
    path = write_summary(tmp_path / "reward", "reward", figures)
    assert path == tmp_path / "reward" / "summary.json"
    expected = {
        "figures": {"accuracy": {"high": None, "low": 0.6, "value": 0.7}, "loss": None},
        "reliability": [{"count": 3}],
        "stage": "reward",
    }
    assert path.read_text() == json.dumps(expected, indent=2) + "\n"  # the keys above are in sorted order
    assert read_summary(tmp_path / "reward") == expected


def test_a_stage_that_runs_has_no_summary(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_summary_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json: expected a JSON object"):
        read_summary(tmp_path)


def test_a_full_disk_keeps_the_old_summary(tmp_path: Path, fill_disk: Callable[[int], None]) -> None:
    write_summary(tmp_path, "sft", {"loss": 1.0})
    fill_disk(20)
    with pytest.raises(UserError, match=r"could not write .*summary\.json: File too large"):
        write_summary(tmp_path, "sft", {"loss": 2.0})
    assert read_summary(tmp_path) == {"stage": "sft", "figures": {"loss": 1.0}}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_print_summary_shows_every_cell_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary("PPO [step 40]", [("gold score", "1.21", "up from 0.4"), ("[KL]", "6.3", "")])
    out = capsys.readouterr().out
    assert "PPO [step 40]" in out
    row = next(line for line in out.splitlines() if "gold score" in line)
    assert row.index("gold score") < row.index("1.21") < row.index("up from 0.4")
    assert "[KL]" in out and "6.3" in out
