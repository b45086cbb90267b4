"""The reward model: it learns, it is calibrated on the SFT model's samples, and PPO loads its folder."""

import json

import pytest
import torch

from rlhf_fast.data import prompt_rows
from rlhf_fast.data.load import load_dataset
from rlhf_fast.models import adapters
from rlhf_fast.recipes import reward
from rlhf_fast.recipes.stage import Stage


def test_learns_a_difference_that_is_there(reward_config, tmp_path):
    figures = reward.train(reward_config(max_steps=12))
    assert figures["accuracy"]["value"] == 1.0
    assert figures["loss"] < 0.3
    summary = json.loads((tmp_path / "reward" / "summary.json").read_text())
    assert sum(bucket["count"] for bucket in summary["margin_buckets"]) == 8
    assert sum(point["count"] for point in summary["reliability"]) == 8


def test_a_token_budget_changes_no_gradient(reward_config, tmp_path, monkeypatch):
    parts = []
    real = reward.score_pairs
    monkeypatch.setattr(
        reward, "score_pairs", lambda stage, rows: parts.append(sum(reward.both_lengths(rows))) or real(stage, rows)
    )
    lines = []
    for settings in ({"micro_batch_size": 8}, {"micro_batch_size": None, "micro_batch_tokens": 200}):
        parts.clear()
        reward.train(reward_config("r", overwrite_output_dir=True, eval_size=0, max_steps=2, **settings))
        text = (tmp_path / "r" / "metrics.jsonl").read_text()
        lines.append([json.loads(line)["grad_norm"] for line in text.splitlines()])
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
    assert max(parts) <= 200 and len(parts) > 2


def test_suspiciously_high_accuracy_is_said(reward_config, capsys):
    reward.train(reward_config(max_steps=12, label_noise_ceiling=0.6))
    assert "above 60%: look for leakage" in capsys.readouterr().err


def test_calibrated_scores_of_the_same_samples_have_mean_0_and_deviation_1(reward_config, trained, monkeypatch):
    seen = []
    original = reward.calibrate

    def spied(stage, sft, prompts):
        real_scores = stage.base.scores
        monkeypatch.setattr(stage.base, "scores", lambda *args: seen.append(args) or real_scores(*args))
        constants = original(stage, sft, prompts)
        again = torch.cat([real_scores(*args) for args in seen]).double()
        assert len(again) == 6
        assert again.mean().item() == pytest.approx(0, abs=1e-5)
        assert again.std().item() == pytest.approx(1, abs=1e-5)
        return constants

    monkeypatch.setattr(reward, "calibrate", spied)
    reward.train(reward_config(sft_adapter=trained["sft_adapter"]))
    assert seen


def test_starts_from_the_sft_adapter(reward_config, trained):
    stage = Stage("reward", reward_config())
    adapters.load_role(stage.base, "sft", trained["sft_adapter"])
    stage.base.add_role("reward", copy_of="sft", head=True)
    sft, copied = stage.base.named_parameters("sft"), stage.base.named_parameters("reward")
    assert copied.keys() == sft.keys() | {"score.weight"}
    assert all(parameter.equal(copied[name]) for name, parameter in sft.items())


def test_saved_folder_loads_with_head_and_calibration(trained, reward_config, data):
    constants = json.loads(open(f"{trained['reward_adapter']}/calibration.json").read())
    stage = Stage("reward", reward_config())
    adapters.load_role(stage.base, "reward", trained["reward_adapter"], want_head=True)
    head = stage.base.heads["reward"]
    assert (head.mean.item(), head.std.item()) == pytest.approx((constants["mean"], constants["std"]))
    rows, _ = prompt_rows(load_dataset(data["ppo"]), stage.base.tokenizer, max_length=64, source="x")
    ids = torch.tensor([rows[0].input_ids])
    hidden = stage.base.hidden("reward", ids, torch.ones_like(ids))[0, -1]
    raw = hidden @ head.weight[0]
    assert stage.base.scores("reward", ids, torch.ones_like(ids)).item() == pytest.approx(
        ((raw - constants["mean"]) / constants["std"]).item(), rel=1e-5
    )
