"""The bench of learning: our run as `make bench-learning` does it, its TRL script, and figures set by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.bench.step import curves, learning, python_reward, runs
from rlhf_fast.config import PPOConfig
from rlhf_fast.models.builtin import tiny_model


def call(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.step.learning", "--model", str(tiny_model()), "--quick", *flags])
    learning.main()


# TRL's place is taken by a script that writes what it was given.
PEER = """
import json, sys
arguments = sys.argv[1:]
given = json.loads(open(arguments[arguments.index("--learning") + 1]).read())
lines = [{"perf/seconds_step": 1, "objective/scores": step, "objective/kl": given["settings"]["seed"],
          "objective/rlhf_reward": given["settings"]["cliprange"], "response/length_mean": 8} for step in (1, 2)]
with open(arguments[2] + "/metrics.jsonl", "w") as file:
    file.writelines(json.dumps(line) + chr(10) for line in lines)
"""


def test_a_quick_run_keeps_every_step_of_both_and_goes_on_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, figures, chart = tmp_path / "peer.py", tmp_path / "learning.json", tmp_path / "learning.png"
    script.write_text(PEER)
    monkeypatch.setitem(runs.PYTHON, "trl", tmp_path / "nowhere" / "python")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="trl, seed 0: no trl in nowhere/python"):
        call(monkeypatch, "--seeds", "1", "--json", str(figures))
    (ours,) = json.loads(figures.read_text())["curves"]
    assert ours["who"] == "rlhf-fast" and ours["seed"] == 0 and ours["length"] == [8.0, 8.0]
    assert ours["kl"][0] == pytest.approx(0, abs=1e-2) and len(ours["explained_variance"]) == 2
    objective = [reward - 0.05 * kl for reward, kl in zip(ours["reward"], ours["kl"], strict=True)]
    assert ours["objective"] == pytest.approx(objective, abs=2e-4)
    assert min(ours["reward"]) >= -4  # a missing stop token costs nothing

    monkeypatch.setitem(runs.PYTHON, "trl", Path(sys.executable))
    monkeypatch.setitem(runs.PEERS, "trl", (str(script), True))
    capsys.readouterr()
    call(monkeypatch, "--seeds", "1", "--json", str(figures), "--chart", str(chart))
    again, trl = json.loads(figures.read_text())["curves"]
    assert again == ours
    assert trl == {"who": "trl", "seed": 0, "reward": [1, 2], "kl": [0, 0], "objective": [0.2, 0.2], "length": [8, 8]}
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "| TRL | 1.50 [1.50, 1.50] |" in capsys.readouterr().out

    found = json.loads(figures.read_text())
    found["settings"]["both"]["kl_coef"] = 0.1
    figures.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="learning.json: its runs were made with other settings; name another file"):
        call(monkeypatch, "--json", str(figures))


def test_our_settings_are_settings_and_the_clip_is_alike() -> None:
    config = PPOConfig(
        **learning.ALIKE | learning.OURS | learning.OURS_ALONE, reward_functions=["a.py:b"], output_dir="x"
    )
    assert config.kl_target is None
    assert config.clip_low == config.clip_high == learning.TRL["cliprange"]
    assert config.value_clip == learning.TRL["cliprange_value"] and config.value_coef == learning.TRL["vf_coef"]


def test_the_reward_by_hand() -> None:
    texts = ["The éta is_on 12 of Four", "word words", "a", "", " 1 "]  # five of six words, none, all, no words
    assert python_reward.score(texts) == pytest.approx([10 * 5 / 6 - 4, -4, 6, -4, -4])


def curve(who: str, seed: int, reward: list[float], **more: Any) -> dict[str, Any]:
    return {"who": who, "seed": seed, "reward": reward, "kl": [0.0, *[4.0] * 6], "objective": reward, **more}


def results() -> dict[str, Any]:
    return {
        "machine": {"cpu": "Some CPU", "cores": 2},
        "versions": {"rlhf-fast": {"torch": "2.13.0"}, "trl": {"torch": "2.12.0", "trl": "1.12.0"}},
        "quick": False,
        "work": {
            "model": "some-model",
            "batch_size": 16,
            "prompt_tokens": [8, 32],
            "response_length": 24,
            "steps": 7,
            "ppo_epochs": 4,
            "lora_r": 16,
            "learning_rate": 3e-4,
        },
        "settings": {"both": {"kl_coef": 0.05}},
        "curves": [
            curve("trl", 0, [1.0] * 5 + [2.0, 2.0]),
            curve("rlhf-fast", 0, [1.0, 1.0, *[3.0] * 5], explained_variance=[-9.0, -9.0, *[0.5] * 5]),
            curve("rlhf-fast", 1, [1.0, 1.0, *[5.0] * 5], explained_variance=[-9.0, -9.0, *[0.25] * 5]),
        ],
    }


def test_the_table_by_hand() -> None:
    text = curves.table(results())
    assert text.startswith(
        "2 cores of Some CPU; torch 2.13.0, trl 1.12.0. Model some-model, bf16; 16 prompts of 8 to 32"
    )
    assert "learning rate 0.0003; KL coefficient 0.05. Means over 2 seeds" in text and "Quick" not in text
    # first 5 steps of ours: (1 + 1 + 3 + 3 + 3) / 5 = 2.2 and (1 + 1 + 5 + 5 + 5) / 5 = 3.4
    assert text.splitlines()[-2:] == [
        "| rlhf-fast | 2.80 [2.20, 3.40] | 4.00 [3.00, 5.00] | 4.00 [4.00, 4.00] | 4.00 [3.00, 5.00] | "
        "0.38 [0.25, 0.50] |",
        "| TRL | 1.00 [1.00, 1.00] | 1.40 [1.40, 1.40] | 4.00 [4.00, 4.00] | 1.40 [1.40, 1.40] |  |",
    ]


def test_blocks_by_hand() -> None:
    assert curves.blocks([1, 2, 3, 4, 5, 7, 9]) == [3, 8]
