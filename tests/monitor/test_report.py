import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.monitor.log import RunLog
from rlhf_fast.monitor.report import write_report
from rlhf_fast.monitor.summary import write_summary

SVG = "{http://www.w3.org/2000/svg}"
SFT = ["Loss"]
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
]


class Page(HTMLParser):
    """Checks that tags are nested correctly, and collects the table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def charts(text: str) -> dict[str, ET.Element]:
    found = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)]
    return {chart.findtext(f"{SVG}title", ""): chart for chart in found}


def report(folder: Path) -> str:
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_a_whole_run_has_every_chart_and_nothing_broken(run_folder: Path) -> None:
    text = report(run_folder)
    page = Page(text)
    assert list(charts(text)) == [*SFT, *REWARD, *PPO]
    for name, value in page.attributes:
        assert not re.search(r"nan|none|inf(?!o)", value or "", flags=re.IGNORECASE) or name == "content", (name, value)
    assert [tag for tag in ("<script", "<link", "<img", "@import", "url(") if tag in text] == []
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not list(run_folder.glob(".*"))


def test_texts_from_the_run_are_escaped(run_folder: Path) -> None:
    text = report(run_folder)
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; friends" in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text and "<b>" not in text
    assert "\x1b" not in text and r"It is wide \x1b[0m and" in text


def test_marks_that_turn_text_are_shown_as_escapes(run_folder: Path) -> None:
    (run_folder / "config.yaml").write_text("dataset_name: a\u202egnp.jsonl\n", encoding="utf-8")
    text = report(run_folder)
    assert "\u202e" not in text and r"a\u202egnp.jsonl" in text


def test_headline_tables(run_folder: Path) -> None:
    rows = Page(report(run_folder)).rows
    assert ["accuracy", "0.7769", "0.752 to 0.801", "held-out pairs"] in rows
    assert ["score of an empty response", "–", "", ""] in rows
    assert ["training tokens", "1,234,567", ""] in rows
    assert ["dataset", "demo/kind <sea>", ""] in rows


def test_samples_pair_the_first_and_the_last_evaluation(run_folder: Path) -> None:
    rows = Page(report(run_folder)).rows
    start = rows.index(["Prompt", "SFT model (step 0)", "PPO policy, step 100"])
    pairs = rows[start + 1 :]
    assert len(pairs) == 12
    for index, (_, before, after) in enumerate(pairs):
        assert f"step 0 row {index}" in before and f"step 100 row {index}" in after
    assert pairs[2][2].endswith("score 2.2 · gold 1.1")
    assert pairs[1][2].endswith("score 2.1")  # its gold score is null


def test_reference_lines_are_labelled(run_folder: Path) -> None:
    found = charts(report(run_folder))
    labels = {title: [text.text for text in found[title].iter(f"{SVG}text")] for title in found}
    assert "noise ceiling 0.85" in labels["Accuracy on held-out pairs"]
    assert "target 6" in labels["KL from the reference"]
    assert {"≤ 0.5", "≤ 1", "≤ 2", "> 2"} <= set(labels["Accuracy by margin"])
    assert "n=200" in labels["Accuracy by margin"]


def test_null_values_are_a_gap(run_folder: Path) -> None:
    chart = charts(report(run_folder))["Critic: explained variance"]
    assert [len(line.attrib["points"].split()) for line in chart.iter(f"{SVG}polyline")] == [40, 56]


def test_a_run_in_its_first_step_shows_dots(tmp_path: Path, ppo: Callable[..., None]) -> None:
    ppo(tmp_path / "ppo", steps=0, ended=False)
    text = report(tmp_path)
    found = charts(text)
    assert list(found) == PPO
    assert not any(list(chart.iter(f"{SVG}polyline")) for chart in found.values())
    dots = {title: len(list(found[title].iter(f"{SVG}circle"))) for title in PPO[:-1]}
    assert dots == {title: 2 if title.startswith("Gold score") else 1 for title in dots}  # held-out, training
    assert ["Prompt", "SFT model (step 0)"] in Page(text).rows  # one evaluation: one column


def test_only_what_is_there_is_shown(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "ppo")
    log.metrics(1, {"objective/kl": 1.0, "objective/scores": float("nan")})
    log.metrics(2, {"objective/kl": 2.0, "perf/seconds_rollout": 3.0})
    RunLog(tmp_path / "sft").metrics(1, {"eval_loss": 2.0})
    text = report(tmp_path)
    assert list(charts(text)) == ["Loss", "KL from the reference", "Seconds per step"]
    assert "Reward model" not in text and "<table" not in text and 'class="ref"' not in text


def test_a_stage_without_a_line_yet_is_a_heading(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"st')
    text = report(tmp_path)
    assert "Supervised fine-tuning" in text and charts(text) == {}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("ended", [True, False])
def test_the_folder_of_one_stage(tmp_path: Path, request: pytest.FixtureRequest, stage: str, ended: bool) -> None:
    folder = tmp_path / "out"
    request.getfixturevalue(stage)(folder)
    if not ended:
        (folder / "summary.json").unlink()
    expected = {"sft": SFT, "reward": REWARD if ended else REWARD[:2], "ppo": PPO}[stage]
    assert list(charts(report(folder))) == expected


def test_a_long_run_is_thinned_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {i % 5}}}\n' for i in range(2000)))
    text = report(tmp_path)
    (line,) = charts(text)["Loss"].iter(f"{SVG}polyline")
    heights = {point.split(",")[1] for point in line.attrib["points"].split()}
    assert len(line.attrib["points"].split()) == 400 and len(heights) == 1  # each the mean of 0, 1, 2, 3, 4
    assert "step (each point the mean of 5 or fewer)" in text


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
