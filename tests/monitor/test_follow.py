"""`rlhf-fast report`: one run, several beside each other, and a run that goes on."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_fast.cli import main
from rlhf_fast.monitor import follow
from rlhf_fast.monitor.log import RunLog
from rlhf_fast.monitor.summary import write_summary


def data_of(page: Path) -> dict[str, dict]:
    (text,) = re.findall(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(text)


def test_one_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_folder)]) == 0
    assert capsys.readouterr().out == f"report: {run_folder / 'report.html'}\n"
    assert 'id="reload"' not in (run_folder / "report.html").read_text(encoding="utf-8")


def test_two_runs_beside_each_other(
    tmp_path: Path, ppo: Callable[..., None], sft: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, steps in (("one", 40), ("two", 60)):
        ppo(tmp_path / name / "ppo", steps=steps)
        home = tmp_path / name
        config = f"output_dir: {home}\nseed: 1\nppo:\n  kl_coef: 0.{steps}\n  sft_adapter: {home}/sft\n"
        (tmp_path / name / "config.yaml").write_text(config)
    sft(tmp_path / "two" / "sft")
    write_summary(tmp_path / "two" / "ppo", "ppo", {"gold_gain": {"value": 0.5, "low": -0.1, "high": 1.1}})
    page = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(page)]) == 0
    charts = data_of(page)
    lines = charts["ppo-gold-score-gold"]["series"]
    assert [(line["label"], line["colour"], line["dash"]) for line in lines] == [
        ("A held-out prompts", 0, 0),
        ("A training prompts", 0, 1),
        ("B held-out prompts", 1, 0),
        ("B training prompts", 1, 1),
    ]
    assert charts["ppo-seconds-per-step"]["categories"] == ["A", "B"]
    assert [line["label"] for line in charts["ppo-scores-of-held-out-responses"]["series"]] == [
        "A step 40",
        "B step 60",
    ]
    text = " ".join(re.sub(r"<script.*?</script>|<[^>]+>", " ", page.read_text(encoding="utf-8"), flags=re.S).split())
    assert "Gain in gold score (score) 1.213 1.08 to 1.34 0.5 -0.1 to 1.1" in text
    assert "Setting A B ppo.kl_coef 0.4 0.6" in text and "sft_adapter" not in text and "seed" not in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["report", "missing"], "expected missing to be the output folder of a run; there is no such folder"),
        (["report", "run", "--output", "mine.html"], "mine.html is there already and is no report of a run"),
        (["report", *["run"] * 7], "expected at most 6 runs to compare, got 7"),
        (["report"], "the following arguments are required: RUN"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    RunLog(tmp_path / "run").metrics(1, {"loss": 1.0})
    Path("mine.html").write_text("mine")
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert Path("mine.html").read_text() == "mine" and not Path("comparison.html").exists()


def test_a_live_run_is_followed_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "SECONDS_BETWEEN_LOOKS", 0.02)
    page = tmp_path / "report.html"
    seen = []

    def run() -> None:
        def wait_for(text: str) -> None:
            while not (page.exists() and text in page.read_text(encoding="utf-8")):
                time.sleep(0.01)
            seen.append('id="reload"' in page.read_text(encoding="utf-8"))

        time.sleep(0.05)
        log = RunLog(tmp_path)
        log.metrics(1, {"loss": 1.0})
        wait_for("up to step 1<")
        log.metrics(2, {"loss": 0.5})
        wait_for("up to step 2<")
        write_summary(tmp_path, "sft", {"steps": 2})

    thread = threading.Thread(target=run)
    thread.start()
    assert main(["report", str(tmp_path), "--follow"]) == 0
    thread.join()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["waiting", str(page), "the"]
    assert seen == [True, True] and 'id="reload"' not in page.read_text(encoding="utf-8")


def test_an_interrupt_ends_following_with_a_page_that_stays_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunLog(tmp_path).metrics(1, {"loss": 1.0})

    def interrupt(seconds: float) -> None:
        assert 'id="reload"' in (tmp_path / "report.html").read_text(encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(follow.time, "sleep", interrupt)
    assert main(["report", str(tmp_path), "--follow"]) == 130
    assert "no longer following" in capsys.readouterr().err
    assert 'id="reload"' not in (tmp_path / "report.html").read_text(encoding="utf-8")
