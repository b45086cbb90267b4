"""The card of a reward model: its numbers by hand, escaped text, and both files in the adapter's folder."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

from rlhf_fast import folders
from rlhf_fast.config import RewardConfig
from rlhf_fast.data import PairRow
from rlhf_fast.recipes import reward, reward_card
from rlhf_fast.recipes.reward_card import Calibration, HeldOut, write_card
from rlhf_fast.rewards import assess
from rlhf_fast.rewards.quality import wilson

EVIL = "a<script>alert(1)</script>|b"
CALIBRATION = Calibration(1.0, 2.0, torch.tensor([-1.0, 1.0, 3.0], dtype=torch.float64))


def row(chosen: int, rejected: int, subset: str | None = None) -> PairRow:
    """A pair with so many tokens in its responses, after a prompt of two."""
    ids = [list(range(2 + length)) for length in (chosen, rejected)]
    return PairRow(1, *ids, chosen, rejected, None, "key", subset)


@pytest.fixture
def found() -> HeldOut:
    """Four pairs: right and longer, right and shorter, wrong and longer, a tie."""
    rows = [row(5, 2, "chat"), row(2, 5, "chat"), row(6, 2, EVIL), row(3, 2, None)]
    scores = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    quality = assess(*scores.unbind(1), torch.tensor([3, -3, 4, 1]))
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    return HeldOut(rows, quality, scores, half, scores[:2].flip(1) + 1e-6)


def config(**settings) -> RewardConfig:
    return RewardConfig(**{"dataset_name": "pairs.jsonl", "output_dir": "out"} | settings)


def table(markdown: str, title: str) -> list[list[str]]:
    """The rows of the table under a heading, without its header."""
    section = markdown.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def card(folder: Path, found: HeldOut | None, **settings) -> tuple[str, str]:
    write_card(folder, config=config(**settings), steps=7, found=found, calibration=CALIBRATION)
    return (folder / "README.md").read_text(), (folder / "card.html").read_text()


def test_the_numbers_are_those_worked_out_by_hand(found, tmp_path):
    markdown, page = card(tmp_path, found)
    low, high = wilson(2.5, 4)
    figures = {name: (value, note) for name, value, note in table(markdown, "Held-out pairs")}
    assert figures["accuracy"] == ("62.5%", f"95% interval {low:.1%} to {high:.1%}")
    assert figures["length alone"][0] == "75.0%"
    assert figures["agreement with length"] == ("33.3%", "prefers the longer side, of 3 unequal pairs")
    assert table(markdown, "By length") == [
        ["-3 to -3", "100.0%", "1"], ["+1 to +1", "50.0%", "1"], ["+3 to +3", "100.0%", "1"], ["+4 to +4", "0.0%", "1"]
    ]  # fmt: skip
    assert [line[1:] for line in table(markdown, "Other forms of the pairs")] == [
        ["62.5%", "4"], ["25.0%", "4"], ["0.0%", "2"], ["100.0%", "2"]
    ]  # fmt: skip
    assert "differ by 1e-06 at most: the score does not depend on its place" in markdown
    subsets = table(markdown, "Subsets")
    assert subsets[0][:2] == ["chat", "100.0%"] and subsets[0][3] == "2" and subsets[1][1] == "0.0%"
    scores = table(markdown, "Distribution of the scores")
    assert scores[0] == ["samples of the SFT model", "+0.00", "1.00", "-0.90", "-0.50", "+0.00", "+0.50", "+0.90", "3"]
    assert scores[1][:2] == ["chosen, held out", "+0.00"] and scores[2][:2] == ["rejected, held out", "+0.00"]
    assert sum(int(cells[2]) for cells in table(markdown, "Reliability")) == 4
    assert '62.5%<div class="bar" style="width: 62.5%">' in page


def test_a_score_that_depends_on_its_place_is_said(found, tmp_path):
    markdown, _ = card(tmp_path, found._replace(exchanged=found.scores[:2].flip(1) + 0.5))
    assert "differ by 0.5 at most: the score depends on its place in the batch: look at padding" in markdown


@pytest.mark.parametrize(
    ("right", "count", "said"),
    [(150, 200, "within it"), (199, 200, "above it: look for leakage"), (100, 200, "below it"), (9, 10, "outside of")],
)
def test_the_healthy_band(right, count, said):
    margins = torch.tensor([1.0] * right + [-1.0] * (count - right))
    assert said in reward_card.judged(assess(margins, torch.zeros(count), torch.zeros(count)), None)[0]


def test_text_of_the_data_is_escaped(found, tmp_path):
    name = f"{EVIL}[x](javascript:y)\u202e\n# title"
    markdown, page = card(tmp_path, found, dataset_name=name, chat_template="{{ 1 }}\n```\n# not a title\n")
    for text in (markdown.split("\n## Settings")[0], page):
        assert "<script" not in text and "&lt;script&gt;" in text and "\u202e" not in text
    assert "[x]" not in markdown.split("\n## Settings")[0] and "\n# title" not in markdown
    assert len(table(markdown, "Subsets")[1]) == 4  # the bar in the name is no border of a cell
    assert all(line.startswith("    ") for line in markdown.split("\n## Settings\n\n")[1].splitlines())
    assert "<script" not in page and re.search(r"https?://", page) is None


def test_without_held_out_pairs_the_card_says_so(tmp_path):
    markdown, page = card(tmp_path, None)
    assert "No pairs were held out" in markdown and "No pairs were held out" in page
    assert "## Held-out pairs" not in markdown and "## Distribution of the scores" in markdown


def test_names_of_the_hub_are_in_the_front_matter_and_paths_are_not(found, tmp_path):
    def metadata(**settings):
        return yaml.safe_load(card(tmp_path, found, **settings)[0].split("---\n")[1])

    local = metadata(model_name_or_path=str(tmp_path))
    assert local["library_name"] == "peft" and not local.keys() & {"base_model", "datasets"}
    hub = metadata(model_name_or_path="Qwen/Qwen2.5-0.5B", dataset_name="openai/gsm8k:main")
    assert (hub["base_model"], hub["datasets"]) == ("Qwen/Qwen2.5-0.5B", ["openai/gsm8k"])
    assert metadata()["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_license_of_the_base_is_the_one_that_its_card_states(tmp_path):
    assert reward_card.base_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    assert reward_card.base_license(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert reward_card.base_license(str(tmp_path)) is None


def test_a_run_writes_both_files_which_a_new_run_replaces(trained):
    folder = Path(trained["reward_adapter"])
    assert huggingface_hub.ModelCard.load(folder / "README.md").data.library_name == "peft"
    markdown = (folder / "README.md").read_text()
    assert table(markdown, "Other forms of the pairs")[0][2] == "8"
    assert table(markdown, "Other forms of the pairs")[2][2] == "2"
    assert "does not depend on its place" in markdown
    assert list(folders.others(folder)) == []
    (folder.parent / "own").mkdir(exist_ok=True)
    (folder.parent / "own" / "README.md").write_text("mine")
    assert [path.name for path in folders.others(folder.parent / "own")] == ["README.md"]


def test_a_response_is_cut_to_half_its_tokens():
    cut = reward.halved(row(5, 1))
    assert (cut.chosen_ids, cut.chosen_response_length) == (list(range(5)), 3)
    assert (cut.rejected_ids, cut.rejected_response_length) == (list(range(3)), 1)
