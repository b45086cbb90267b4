"""Every example's YAML loads, and the tiny one runs all three stages."""

import json
import sys
import time
from pathlib import Path

import pytest

from rlhf_fast.cli import main
from rlhf_fast.config_load import load_run

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_loads(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from anywhere
    config = load_run(str(path), {})
    assert config.output_dir == f"runs/{path.stem}"


def test_tiny_runs_all_three_stages_within_a_minute(tmp_path):
    start = time.perf_counter()
    assert main(["run", "--config", str(ROOT / "examples" / "tiny.yaml"), "--output_dir", str(tmp_path / "tiny")]) == 0
    assert time.perf_counter() - start < 60
    figures = {
        s: json.loads((tmp_path / "tiny" / s / "summary.json").read_text())["figures"] for s in ("sft", "reward", "ppo")
    }
    assert figures["sft"]["validation_loss"]["value"] < figures["sft"]["validation_loss_first"]
    assert figures["reward"]["accuracy"]["low"] <= figures["reward"]["accuracy"]["value"]
    assert "gold_gain" in figures["ppo"]
    report = (tmp_path / "tiny" / "report.html").read_text()
    for text in ("SFT", "Reward", "PPO", "KL"):
        assert text in report


def test_gsm8k_reward_functions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    reward = __import__("gsm8k_reward")
    answers = ["6 + 6 = 12\n#### 12", "so\n#### 1,200", "#### -3.50"]
    said = ["I get\n#### 12 eggs", [{"role": "assistant", "content": "#### 1200"}], "The answer is -3.5"]
    assert reward.solved([""] * 3, said, answer=answers) == [1.0, 1.0, 0.0]
    assert reward.gives_answer([""] * 3, said) == [0.2, 0.2, 0.0]
    sys.modules.pop("gsm8k_reward")


def test_the_custom_loop_learns_its_reward_in_under_60_lines(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import custom_loop

    means = custom_loop.main(steps=16)
    assert means[-1] > means[0] + 1
    assert len((ROOT / "examples" / "custom_loop.py").read_text().splitlines()) < 60


def test_the_fast_losses_are_the_naive_ones_in_under_80_lines(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import fast_losses

    monkeypatch.setattr(fast_losses, "RESPONSE", 6)
    results = fast_losses.main()

    (naive, _), (fast, _) = results.values()
    assert fast == pytest.approx(naive, rel=1e-5)
    assert len((ROOT / "examples" / "fast_losses.py").read_text().splitlines()) < 80
