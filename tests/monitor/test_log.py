import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.monitor.log import RunLog, read_lines


def strict(line: str) -> dict[str, object]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_line_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new" / "sft")
    log.metrics(1, {"loss": 2.5, "lr": 1e-4})
    text = (tmp_path / "new" / "sft" / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": 2.5, "lr": 0.0001}\n'


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.metrics(1, {"a": math.nan, "b": math.inf, "c": np.float32(-math.inf), "d": np.float32(0.5), "e": np.int64(3)})
    log.samples(1, [{"score": math.nan, "scores": [1.0, math.inf]}])
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "a": None, "b": None, "c": None, "d": 0.5, "e": 3,
    }  # fmt: skip
    assert strict((tmp_path / "samples.jsonl").read_text()) == {"step": 1, "score": None, "scores": [1.0, None]}


def test_a_value_named_step_does_not_replace_the_step(tmp_path: Path) -> None:
    RunLog(tmp_path).samples(7, [{"step": 1, "prompt": "x"}])
    assert read_lines(tmp_path / "samples.jsonl") == [{"step": 7, "prompt": "x"}]


def test_any_text_comes_back_as_it_was(tmp_path: Path) -> None:
    texts = ["line\nbreak", "a\u2028b\u0085c", "half \ud83d of a character", "\x00\x1b", "日本語"]
    RunLog(tmp_path).samples(1, [{"response": text} for text in texts])
    assert [row["response"] for row in read_lines(tmp_path / "samples.jsonl")] == texts
    assert "日本語" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_new_run_refuses_a_folder_that_holds_another(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=f"{name} holds another run"):
        RunLog(tmp_path)
    assert (tmp_path / name).read_text() == '{"step": 1}\n'


def test_resume_drops_later_steps_and_a_half_line_and_goes_on(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.metrics(step, {"loss": step / 2})
        log.samples(step, [{"index": 0}, {"index": 1}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    log = RunLog(tmp_path, resume_step=2)
    log.metrics(3, {"loss": 9.0})
    log.samples(3, [{"index": 5}])
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]
    samples = [(row["step"], row["index"]) for row in read_lines(tmp_path / "samples.jsonl")]
    assert samples == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_resume_before_the_first_line_starts_afresh(tmp_path: Path) -> None:
    RunLog(tmp_path, resume_step=0).metrics(1, {"loss": 1.0})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_a_last_line_cut_anywhere_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first, last = b'{"step": 1, "a": 1.25}\n', '{"step": 2, "text": "é"}\n'.encode()
    for cut in range(len(last) - 1):
        path.write_bytes(first + last[:cut])
        assert read_lines(path) == [{"step": 1, "a": 1.25}], cut
    path.write_bytes(first + last[:-1])  # only the newline is lost: the object is whole
    assert read_lines(path) == [{"step": 1, "a": 1.25}, {"step": 2, "text": "é"}]


@pytest.mark.parametrize("broken", ['{"step": 2, "lo', "", "[1, 2]", "nonsense"])
def test_a_broken_line_elsewhere_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        read_lines(path)
    path.write_text(f'{{"step": 1}}\n{broken}\n')  # it has its newline, so no killed run cut it
    with pytest.raises(UserError, match="line 2"):
        read_lines(path)


def test_a_line_without_a_step_stops_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2.0}\n')
    with pytest.raises(UserError, match='line 2: expected a whole number under "step", got None'):
        RunLog(tmp_path, resume_step=5)


def test_a_full_disk_is_an_error_and_keeps_whole_lines(tmp_path: Path, fill_disk: Callable[[int], None]) -> None:
    log = RunLog(tmp_path)
    log.metrics(1, {"loss": 1.0})
    fill_disk(len('{"step": 1, "loss": 1.0}\n') + 10)
    with pytest.raises(UserError, match=r"could not write .*metrics\.jsonl: File too large"):
        log.metrics(2, {"loss": 2.0})
    fill_disk(10_000)
    log.metrics(2, {"loss": 3.0})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}]


def test_a_resume_on_a_full_disk_loses_nothing(tmp_path: Path, fill_disk: Callable[[int], None]) -> None:
    log = RunLog(tmp_path)
    for step in range(5):
        log.metrics(step, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    fill_disk(20)
    with pytest.raises(UserError, match="File too large"):
        RunLog(tmp_path, resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write .*file/run: Not a directory"):
        RunLog(tmp_path / "file" / "run")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not read .*none\.jsonl: No such file"):
        read_lines(tmp_path / "none.jsonl")
