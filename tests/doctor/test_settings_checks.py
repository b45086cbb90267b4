"""The doctor's checks of settings, of several stages together, and of the machine."""

import re
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

import rlhf_fast
from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.doctor import between, machine, settings
from rlhf_fast.doctor.findings import run_one

MADE = {"dataset_name": "x", "output_dir": "y"}
REWARD = {"reward_adapter": "r"}


@pytest.mark.parametrize(
    "config",
    [
        SFTConfig(**MADE),
        RewardConfig(**MADE),
        DPOConfig(**MADE),
        PPOConfig(**MADE, **REWARD, num_mini_batches=2),
        PPOConfig(**MADE, **REWARD, max_steps=100, kl_horizon=1000),
    ],
    ids=lambda config: type(config).__name__,
)
def test_defaults_pass(config):
    found = [check(config) for check in settings.CHECKS]
    assert [one for one in found if one is not None and one.level != "ok"] == []


@pytest.mark.parametrize(
    ("check", "changed", "level", "said"),
    [
        ("learning_rate", {"learning_rate": 6e-4}, "note", "0.0006; usual with adapters is 1e-05 to 0.0003"),
        ("learning_rate", {"learning_rate": 1e-2}, "warning", "0.01; usual"),
        ("batch_size", {"batch_size": 4}, "warning", "--batch_size 4; usual with adapters is 32 to 2048"),
        ("temperature", {"temperature": 0.1}, "warning", "--temperature 0.1"),
        ("missing_eos", {"missing_eos_penalty": 0.0}, "warning", "0 is subtracted"),
        ("missing_eos", {"missing_eos_score": 0.5}, "warning", "scores 0.5"),
        ("missing_eos", {"ignore_eos": True}, "warning", "--ignore_eos"),
        ("kl_penalty", {"kl_coef": 0.0}, "warning", "multiplies it, so it stays 0"),
        ("kl_penalty", {"max_steps": 10}, "note", "640 episodes --kl_horizon 10000 lets beta grow 1.01 times"),
        ("mini_batches", {"num_mini_batches": 8}, "warning", "32 updates a rollout"),
        ("mini_batches", {"num_mini_batches": 16, "num_ppo_epochs": 1}, "error", "needs as many micro-batches"),
        ("mini_batches", {"batch_size": 8, "num_mini_batches": 2, "micro_batch_size": 4}, "note", "of 4 episodes"),
    ],
)
def test_a_setting_far_from_the_usual_is_found(check, changed, level, said):
    config = PPOConfig(**MADE, **REWARD, **{"micro_batch_size": 8} | changed)
    found = run_one(getattr(settings, check), config)
    assert found.level == level and said in found.found and found.why and found.change


# ---- several stages


def test_stages_that_fit_together_pass(data_of):
    run = {"sft": data_of("sft"), "reward": data_of("reward", eval_size=0), "ppo": data_of("ppo", eval_size=0)}
    for name in ("reward", "ppo"):
        run[name].config.response_length = 16
    found = {check.__name__: check(run) for check in between.CHECKS}
    assert {name: one.found for name, one in found.items() if one.level != "ok"} == {}
    assert [check({"sft": run["sft"]}) for check in between.CHECKS] == [None] * 4


def test_held_out_prompts_of_an_earlier_stage_are_found(data_of):
    run = {"sft": data_of("sft", eval_size=0), "reward": data_of("reward"), "ppo": data_of("ppo", eval_size=2)}
    found = between.leakage_between_stages({"sft": run["sft"], "reward": run["reward"]})
    assert found.level == "note" and "1 of 1 (100.0%) held-out prompts of reward are trained on by sft" in found.found
    found = between.leakage_between_stages(run)
    assert found.level == "warning" and "2 of 2 (100.0%) held-out prompts of ppo are trained on by sft" in found.found


def test_other_forms_lengths_and_calibrations_are_found(data_of):
    plain = [{"prompt": f"q{i}", "completion": "a long answer"} for i in range(12)]
    run = {"sft": data_of("sft", plain), "reward": data_of("reward"), "ppo": data_of("ppo", temperature=0.7)}
    found = between.prompt_form(run)
    assert found.level == "warning" and "different forms of prompts: sft: plain text" in found.found
    found = between.response_length(run)
    assert found.level == "warning" and re.search(r"ppo: --response_length 8; \d+ of 22 .* are longer", found.found)
    found = between.calibration(run)
    assert found.level == "warning" and "--temperature 1 and 0.7, --response_length 8 and 8" in found.found


# ---- the machine


def test_this_machine_passes(data_of):
    data = data_of("sft")
    assert [check(data).level for check in machine.CHECKS] == ["ok"] * 3
    assert machine.backends("cpu").level in ("ok", "warning")  # warning: this checkout has no engine


def test_operations_on_torch_alone_and_a_backend_that_cannot_run_are_found():
    with rlhf_fast.use_backend("torch"):
        assert machine.backends("cpu").level == "warning"
    if not torch.cuda.is_available():
        with rlhf_fast.use_backend("cuda"):
            found = machine.backends("cpu")
        assert found.level == "error" and "cannot run" in found.found


def test_too_little_memory_or_disk_is_found(data_of, monkeypatch):
    data = data_of("sft")
    room = namedtuple("room", "total available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room(10**12, 10**6))
    found = machine.memory(data)
    assert found.level == "warning" and found.found.endswith("; 0.0 of 1000.0 GB are free")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room(10**6, 10**6))
    assert machine.memory(data).level == "error"
    usage = namedtuple("usage", "free")
    for free, level in ((1000, "error"), (700_000, "warning")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, free=free: usage(free))
        found = machine.disk(data)
        assert found.level == level, found.found


def test_a_folder_that_is_taken_is_found(data_of):
    data = data_of("sft")
    Path(data.config.output_dir).mkdir(parents=True)
    (Path(data.config.output_dir) / "metrics.jsonl").write_text("{}\n")
    found = machine.output_folder(data)
    assert found.level == "warning" and "which no run made" in found.found
