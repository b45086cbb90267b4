"""Untrusted text for display: no control characters or markup, and bounded length."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.text import one_line, printable, shown, tell


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("\x00\x07\r\x7f\x9b", r"\x00\x07\x0d\x7f\x9b"),
        ("a\u202eb\u2066c\u200fd\u061c", r"a\u202eb\u2066c\u200fd\u061c"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("a\udcffb", r"a\udcffb"),
        ("zeile\n\tTab [red] äöü 日本 🙂", "zeile\n\tTab [red] äöü 日本 🙂"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected
    assert printable(text).encode()


def test_one_line_is_one_and_has_an_end():
    assert one_line("a\r\n  b\nc\n") == "a b c"
    assert one_line("x" * 9000, 10) == "x" * 10 + " ..."


def test_a_value_without_end_is_shown_short():
    bomb: list = ["x" * 100] * 9
    for _ in range(40):
        bomb = [bomb] * 9
    for value in (bomb, 10**6000, "y" * 10**6, {"k" * 10**5: 1}):
        assert len(shown(value)) <= 210
    assert [shown(value) for value in (None, 1.5, "a", ["a"], {"a": 1})] == ["None", "1.5", "'a'", "['a']", "{'a': 1}"]


def test_a_reader_that_has_gone_ends_nothing():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        tell("nobody reads this", pipe)
        tell("nor this", pipe)
    closed = io.StringIO()
    closed.close()
    tell("nor this", closed)


@pytest.mark.parametrize("redirection", [">&- 2>&- <&-", "2>/dev/full", "| true"])
def test_a_run_needs_no_reader(redirection, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    flags = "--model_name_or_path tiny-random --dataset_name d.jsonl --eval_size 0 --max_steps 1 --output_dir out"
    line = f"set -o pipefail; {sys.executable} -m rlhf_fast.cli sft {flags} {redirection}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "summary.json").is_file()
