"""The browser of samples: order, diff, shading, text that is data, and the app's keys."""

import asyncio
import html
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.cli import main
from rlhf_fast.errors import UserError
from rlhf_fast.monitor.log import RunLog
from rlhf_fast.monitor.samples import Order, Samples, choose, order_of
from rlhf_fast.monitor.samples_app import SamplesApp
from rlhf_fast.monitor.samples_text import body, diff_text, print_samples
from rlhf_fast.monitor.words import word_diff

HOSTILE = "[bold]a\x1b[2J\u202eb[/bold] :smile: " + "x" * 300
TOKENS = {
    "tokens": ["It", " is", "\x1b", " so"],
    "token_kl": [0.1, 0.0, 4.5, None],
    "token_advantage": [0.5, -2.0, 0, 0],
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two held-out prompts at steps 0 and 8; two training rows of step 4, one of them with values of its tokens."""
    writer = RunLog(tmp_path / "ppo")
    writer.metrics(1, {"objective/kl": 1.0})
    evaluated = {0: ["The sea is wide.", HOSTILE], 8: ["The sea is blue and wide.", "Fine."]}
    rows: dict[int, list[dict[str, Any]]] = {
        step: [
            {"split": "eval", "index": index, "prompt": f"Sea {index}?", "response": text, "score": step - index / 2}
            for index, text in enumerate(texts)
        ]
        for step, texts in evaluated.items()
    }
    low = {
        "split": "train",
        "index": 5,
        "prompt": "Moon?",
        "response": "It is so",
        "score": -1.0,
        "kl": 9.5,
        "length": 4,
    }
    rows[4] = [
        {**low, **TOKENS, "stopped": False, "why": "highest_kl"},
        {**low, "score": 0.25, "kl": 2.0, "length": 30},
    ]
    for step in sorted(rows):
        writer.samples(step, rows[step])
    return tmp_path


def scores(samples: Samples, order: Order) -> list[float]:
    return [samples.rows[place]["score"] for place in samples.sorted(order)]


def test_worst_and_best_come_first_and_rows_without_the_key_last(log: Path) -> None:
    samples = choose(log)
    assert scores(samples, order_of("score", None)) == [-1.0, -0.5, 0.0, 0.25, 7.5, 8.0]
    assert scores(samples, order_of(None, "score"))[:2] == [8.0, 7.5]
    assert scores(samples, order_of("kl", None)) == [-1.0, 0.25, 0.0, -0.5, 8.0, 7.5]
    assert scores(samples, order_of("length", None))[:2] == [0.25, -1.0]
    assert scores(samples, order_of(None, None))[:2] == [8.0, 7.5]  # the newest


def test_what_is_chosen_and_paired(log: Path) -> None:
    assert len(choose(log, step=4).rows) == 2 and len(choose(log, prompt="SEA 1").rows) == 2
    samples = choose(log, diff="sft")
    assert [(row["step"], row["index"]) for row in samples.rows] == [(8, 0), (8, 1)]
    assert [other and other["response"] for other in samples.others] == ["The sea is wide.", HOSTILE]
    with pytest.raises(UserError, match="none of the 6 samples of .* matches --step 5; their steps are 0, 4, 8"):
        choose(log, step=5)
    with pytest.raises(UserError, match="--diff must be sft or a step"):
        choose(log, diff="best")


def test_a_diff_of_words_is_marked_without_colour_too() -> None:
    parts = [("=", ["a"]), ("-", [" b"]), ("+", [" x"]), ("=", ["\nc"]), ("+", [" d"])]
    assert word_diff("a b  c", "a x\nc d") == parts
    assert diff_text("a b c", "a x\nc d").plain == "a [-b-] {+x+}\nc {+d+}"
    assert diff_text("", "a").plain == "{+a+}"
    assert diff_text("a", "").plain == "[-a-]" and diff_text("", "").plain == ""
    assert diff_text("a", "b").plain == "[-a-] {+b+}"


def test_tokens_are_shaded_by_size_and_the_largest_are_named(log: Path) -> None:
    [row, _] = choose(log, step=4).rows
    text = body(row, None, at=0, diff=False, shade="token_kl")
    assert "It is\\x1b so" in text.plain and "shaded by KL  largest '\\x1b' +4.5  'It' +0.1" in text.plain
    place = text.plain.rindex("\\x1b")
    assert any(span.start == place and "underline" in str(span.style) for span in text.spans)
    assert (
        "no advantage of its tokens" in body({"response": "a"}, None, at=0, diff=False, shade="token_advantage").plain
    )


def test_text_without_a_terminal(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", str(log), "--worst", "score", "--limit", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("2 of 6 samples (--limit), lowest score first\n\nstep 4  train  prompt 5  score -1  KL 9.5")
    assert "[bold]a\\x1b[2J\\u202eb[/bold] :smile: " + "x" * 300 in text
    assert not {"\x1b", "\u202e"} & set(text)
    assert main(["samples", str(log), "--diff", "sft"]) == 0
    text = capsys.readouterr().out
    assert "The sea is {+blue and+} wide." in text and "[-[bold]a\\x1b[2J\\u202eb[/bold] :smile: " in text
    assert not {"\x1b", "\u202e"} & set(text)


def test_mistakes_are_one_line(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, expected in [
        (["--worst", "kl", "--best", "score"], "expected --worst or --best, got both"),
        (["--limit", "0"], "--limit must be 1 or more; got 0"),
        (["--worst", "gold"], "invalid choice: 'gold'"),
    ]:
        assert main(["samples", str(log), *flags]) == 2
        assert expected in capsys.readouterr().err
    assert main(["samples"]) == 2
    assert "the following arguments are required: RUN" in capsys.readouterr().err


def test_old_rows_show_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_samples(Samples([{"response": "Hi."}], 0, [None]), Order(), diff=False, limit=3)
    assert capsys.readouterr().out == "1 samples, newest step first\n\n\nPrompt\n\n\nResponse\nHi.\n"


def screen(app: SamplesApp) -> str:
    """What the terminal shows, line by line."""
    lines: dict[str, str] = {}
    for height, text in re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>(.*?)</text>', app.export_screenshot()):
        lines[height] = lines.get(height, "") + html.unescape(text).replace("\xa0", " ")
    return "\n".join(lines.values())


def test_the_app_in_a_small_terminal(log: Path) -> None:
    seen: dict[str, str] = {}

    async def use() -> None:
        app = SamplesApp("out", choose(log), Order("score", descending=False), diff=False)
        async with app.run_test(size=(80, 24)) as pilot:
            for keys in ("", "t", "down", "ctrl+end", "d", "r", "s"):
                await pilot.press(*([keys] if keys else []))
                await pilot.pause()
                seen[keys] = screen(app)
            await pilot.press("q")
        assert app.return_code == 0

    asyncio.run(use())
    assert "out: 6 samples, lowest score first" in seen[""] and "score ↑" in seen[""] and "not ended" in seen[""]
    assert "shaded by KL  largest '\\x1b' +4.5" in seen["t"]
    assert "[bold]a\\x1b[2J\\u202eb[/bold] :smile:" in seen["down"] and "no KL of its tokens" in seen["down"]
    assert not {"\x1b", "\u202e"} & set(seen["down"])
    assert "Quit" in seen["down"] and "Sort" in seen["down"]
    assert "step 8  eval  prompt 0" in seen["ctrl+end"] and "The sea is {+blue and+} wide." in seen["d"]
    assert "highest score first" in seen["r"] and "highest KL first" in seen["s"] and "KL ↓" in seen["s"]
    assert "step 4  train  prompt 5  score -1  KL 9.5" in seen["s"]  # the first of the new order
