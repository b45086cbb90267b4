"""The page of one run: what is in it, what it hides, and that texts from models and data stay text."""

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.monitor.log import RunLog
from rlhf_fast.monitor.report import write_report
from rlhf_fast.monitor.summary import write_summary
from rlhf_fast.monitor.texts import differences

SFT = ["Loss", "Peak memory"]
REWARD = ["Accuracy on held-out pairs", "Pairwise loss", "Reliability", "Accuracy by margin"]
PPO = [
    "Score",
    "Score on held-out prompts",
    "Gold score: gold",
    "KL from the reference",
    "KL coefficient",
    "Entropy",
    "Response length",
    "Diversity (distinct-2)",
    "Critic: explained variance",
    "Clipped policy updates",
    "Seconds per step",
    "Peak memory",
    "Score against KL",
    "Trained score against gold",
    "Scores of held-out responses",
    "Lengths of held-out responses",
]


class Page(HTMLParser):
    """The page without its scripts: checks that tags are nested correctly, and collects texts, rows and charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.texts: list[str] = []
        self.data: dict[str, Any] = {}
        self.feed(text)
        self.close()
        assert self.open == []
        self.charts = dict(zip(self.titles, self.data.values(), strict=True))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.data = json.loads(data) if data.startswith("{") else self.data
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        elif data.startswith(": ") and self.open[-2:] == ["summary", "span"]:
            self.titles.append(data.removeprefix(": "))
        elif "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_whole_run_has_every_chart_in_words_and_numbers(run_folder: Path) -> None:
    found = page(run_folder)
    assert found.titles == [*SFT[:1], *REWARD, *PPO]
    for name, value in found.attributes:
        assert not re.search(r"\bnan\b|none|\binf\b", value or "", flags=re.IGNORECASE) or name == "content", (
            name,
            value,
        )
    assert not list(run_folder.glob(".*"))
    assert found.charts["KL from the reference"]["levels"] == [{"value": 6, "label": "target 6"}]
    assert found.charts["Accuracy on held-out pairs"]["levels"] == [{"value": 0.85, "label": "noise ceiling 0.85"}]
    assert found.charts["Accuracy by margin"]["categories"] == ["≤ 0.5", "≤ 1", "≤ 2", "> 2"]
    assert found.charts["Accuracy by margin"]["notes"][-1] == "n=200"
    stairs = [score for _, score in found.charts["Score against KL"]["frontiers"][0]["points"]]
    assert stairs == sorted(stairs) and len(stairs) > 3


def test_the_page_may_run_its_own_scripts_alone_and_asks_for_nothing(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]*)"', text)
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy and len(scripts) == 3
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy[1] == f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'"
    rest = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert [tag for tag in ("<link", "<img", "@import", "url(", "http:", "https:", '"refresh"') if tag in rest] == []


def test_texts_from_the_run_stay_text(run_folder: Path) -> None:
    (run_folder / "config.yaml").write_text("dataset_name: a\u202egnp.jsonl\n", encoding="utf-8")
    with open(run_folder / "ppo" / "metrics.jsonl", "a") as file:  # the charts of it have its name in their data
        file.write(2 * '{"step": 100, "eval/scores": 1.0, "eval/</script>\\u202e": 1.0}\n')
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; friends" in text
    assert "\x1b" not in text and r"It is wide \x1b[0m and" in text
    assert "\u202e" not in text and r"a\u202egnp.jsonl" in text
    assert text.count("</script>") == 4  # three scripts and their data
    assert Page(text).charts[r"Trained score against </script>\u202e"]["y"] == r"</script>\u202e score"


def test_three_sentences_come_first_and_verdicts_lead_to_their_charts(run_folder: Path) -> None:
    found = page(run_folder)
    start = found.text.index("Something looks wrong") - 100
    expected = (
        "It worked: on held-out prompts the gold score rose by 1.21 (95% interval 1.08 to 1.34). "
        "Something looks wrong: KL explosion (PPO, steps 40 to 60). Try next: Lower the learning rate <half>. "
        "KL explosion PPO, steps 40 to 60, likely (85%) KL rose from 2 to 20 nats"
    )
    assert expected in found.text[start:]
    assert ("href", "#ppo-kl-from-the-reference") in found.attributes and "val/ratio" in found.texts
    ranges = {title: chart["ranges"] for title, chart in found.charts.items() if chart.get("ranges")}
    assert ranges == dict.fromkeys(
        ["Score", "KL from the reference"], [{"first": 40, "last": 60, "label": "KL explosion"}]
    )


@pytest.mark.parametrize(
    "gain, start",
    [
        ({"value": 0.2, "low": 0.1, "high": 0.3}, "It worked: on held-out prompts the gold score rose by 0.2"),
        ({"value": 0.2, "low": -0.1, "high": 0.3}, "It is not clear that it worked:"),
        ({"value": -0.2, "low": -0.3, "high": -0.1}, "It did not work: on held-out prompts the gold score fell by 0.2"),
    ],
)
def test_the_interval_of_the_gain_decides(tmp_path: Path, ppo: Callable[..., None], gain: Any, start: str) -> None:
    ppo(tmp_path, steps=10)
    write_summary(tmp_path, "ppo", {"gold_gain": gain})
    (tmp_path / "verdicts.json").write_text('{"verdicts": []}')
    text = page(tmp_path).text
    assert start in text and "None of the known failures was found" in text


def test_figures_have_names_units_and_words(run_folder: Path) -> None:
    rows = [[" ".join(cell.split()) for cell in row] for row in page(run_folder).rows]
    assert ["Accuracy", "0.7769 share of pairs", "0.752 to 0.801"] in [row[:3] for row in rows]
    assert ["Margin", "– score", ""] in [row[:3] for row in rows]  # it is not a number
    assert ["training tokens", "1,234,567", "", ""] in rows  # a figure that is not declared
    assert ["dataset", "demo/kind <sea>"] in [row[:2] for row in rows] or ["Dataset", "demo/kind <sea>"] in [
        r[:2] for r in rows
    ]
    first = rows[[row[0] for row in rows].index("Gain in gold score")]
    assert first == ["Gain in gold score", "1.213 score", "1.08 to 1.34", "64 held-out prompts."]


def test_samples_of_each_evaluation_stand_beside_the_first(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert re.findall(r'<option value="(\d+)"', text) == [str(step) for step in range(10, 101, 10)]
    shown = re.findall(r'<div data-step="(\d+)">', text)
    assert shown == ["100"] * 15  # of the others, each is hidden
    assert "and <del>wet.</del> <ins>blue, calm and generous.</ins>\nstep <del>0</del> <ins>100</ins> row 3" in text
    assert "score 2.2 · gold 1.1 · tokens 22" in text and "score 2.1 · tokens 21" in text  # its gold score is null


def test_differences_mark_words_and_escape_them() -> None:
    marked = differences("a <b> c\x1b", "a <i> c\x1b d")
    assert marked == r"a <del>&lt;b&gt;</del> <ins>&lt;i&gt;</ins> c\x1b <ins>d</ins>"
    assert "<ins>" not in differences("one two three four", "quite something else here")


def test_tokens_have_levels_and_titles(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert '<span data-k="1" data-a="-1" title="token 2, KL +0.200 nats, advantage -0.200"> is</span>' in text
    assert '<span data-k="3" data-a="0" title="token 4, KL +2.500 nats, advantage +0.000">\\u202eand</span>' in text


def test_null_values_are_a_gap(run_folder: Path) -> None:
    (line,) = page(run_folder).charts["Critic: explained variance"]["series"]
    assert [y is None for _, y in line["points"]] == [40 <= step < 45 for step in range(101)]


def test_a_run_in_its_first_step(tmp_path: Path, ppo: Callable[..., None]) -> None:
    ppo(tmp_path / "ppo", steps=0, ended=False)
    found = page(tmp_path)
    assert found.titles == [title for title in PPO if " against " not in title]  # these need two dots
    assert "PPO is at step 0: too early to say whether it works." in found.text
    assert "Nobody has looked for known failures" in found.text
    assert ["Prompt", "SFT model (step 0)"] in found.rows  # one evaluation: one column


def test_only_what_is_there_is_shown(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "ppo")
    log.metrics(1, {"objective/kl": 1.0, "objective/scores": float("nan")})
    log.metrics(2, {"objective/kl": 2.0, "perf/seconds_rollout": 3.0})
    log.samples(2, [{"split": "eval", "prompt": "p", "response": "r"}, {"split": "train"}])
    RunLog(tmp_path / "sft").metrics(1, {"eval_loss": 2.0})
    found = page(tmp_path)
    assert found.titles == ["Loss", "KL from the reference", "Seconds per step"]
    assert "Reward model" not in found.text and found.rows == []


def test_a_stage_without_a_line_yet_is_a_heading(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"st')
    found = page(tmp_path)
    assert "Supervised fine-tuning" in found.text and found.titles == []


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("ended", [True, False])
def test_the_folder_of_one_stage(tmp_path: Path, request: pytest.FixtureRequest, stage: str, ended: bool) -> None:
    folder = tmp_path / "out"
    request.getfixturevalue(stage)(folder)
    if not ended:
        (folder / "summary.json").unlink()
    expected = {"sft": SFT[:1], "reward": REWARD if ended else REWARD[:2], "ppo": PPO}[stage]
    assert page(folder).titles == expected


def test_a_run_of_ten_thousand_steps_is_a_small_page_and_says_that_it_is_thinned(tmp_path: Path) -> None:
    row = {f"objective/{name}": 0.123456789 for name in ("scores", "kl", "kl_coef", "entropy", "gold")}
    row |= {f"perf/seconds_{name}": 1.5 for name in ("rollout", "score", "update")} | {"response/length_mean": 250.5}
    tokens = {"tokens": ["tok"] * 300, "token_kl": [0.5] * 300, "token_advantage": [0.5] * 300, "why": "first"}
    words = ["<w>", "sea", "blue", "und", "世界", "of", "salt"]
    with open(tmp_path / "metrics.jsonl", "w") as metrics, open(tmp_path / "samples.jsonl", "w") as samples:
        for step in range(10_000):
            metrics.write(json.dumps({"step": step, **row}) + "\n")
            line = {"step": step, "split": "train", "prompt": "p" * 200, "response": "r" * 600, "score": 1.0, "kl": 2.0}
            samples.write(json.dumps(line | (tokens if step % 100 == 0 else {})) + "\n")
            for index in range(64 if step % 250 == 0 else 0):
                response = " ".join(words[(step // 7 + index * i) % 7] for i in range(400))
                line = {"step": step, "split": "eval", "index": index, "prompt": "p" * 900, "response": response}
                samples.write(json.dumps(line | {"score": 1.0, "length": 400}) + "\n")
    start = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - start < 2.0
    assert path.stat().st_size < 3_000_000
    charts = Page(path.read_text(encoding="utf-8")).charts
    assert all(len(line["points"]) <= 400 for chart in charts.values() for line in chart.get("series", []))
    assert charts["Score"]["x"] == "step (each point the mean of 25 or fewer)"


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected .* to hold metrics\.jsonl or one of sft/metrics\.jsonl"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_an_unknown_stage_is_an_error(tmp_path: Path) -> None:
    RunLog(tmp_path).metrics(1, {"loss": 1.0})
    write_summary(tmp_path, "grpo", {})
    with pytest.raises(UserError, match="expected stage to be one of sft, reward, dpo, ppo, got 'grpo'"):
        write_report(tmp_path)


def test_a_broken_line_is_named(run_folder: Path) -> None:
    path = run_folder / "ppo" / "metrics.jsonl"
    path.write_text("oops\n" + path.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
        write_report(run_folder)
