"""A run killed at any step and resumed is bitwise the run never killed; a damaged checkpoint is passed over."""

import copy
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_fast import checkpoint
from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.recipes import dpo, ppo, reward, sft
from rlhf_fast.recipes.stage import Stage

TRAIN = {"sft": sft.train, "reward": reward.train, "dpo": dpo.train, "ppo": ppo.train}
STEPS = 4


class Killed(BaseException):
    """Not an Exception: like SIGKILL, nothing is allowed to save anything on its way out."""


@pytest.fixture
def config_of(sft_config, reward_config, dpo_config, ppo_config):
    return {"sft": sft_config, "reward": reward_config, "dpo": dpo_config, "ppo": ppo_config}


def run_until(monkeypatch, train, config, update: int, error: type[BaseException]) -> None:
    """Trains until the ``update``-th optimizer step (from 1) of this process would begin; there ``error`` is raised."""
    original, calls = Stage.update, []

    def counted(self, *args):
        calls.append(None)
        if len(calls) == update:
            raise error
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "update", counted)
        with pytest.raises(Interrupted if error is KeyboardInterrupt else error):
            train(config)


def lines(folder: Path, name: str) -> list[dict]:
    """The file without what a clock or the memory's high-water mark says."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()] if (folder / name).exists() else []
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in found]


def assert_same_run(folder: Path, other: Path) -> None:
    assert lines(folder, "metrics.jsonl") == lines(other, "metrics.jsonl")
    assert lines(folder, "samples.jsonl") == lines(other, "samples.jsonl")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    assert any(path.parts[0] == f"checkpoint-{STEPS}" for path in files)
    for path in files:
        tensors, others = load_file(folder / path), load_file(other / path)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert tensor.equal(others[name]), (path, name)
    state = [json.loads((f / f"checkpoint-{STEPS}" / "state.json").read_text()) for f in (folder, other)]
    assert state[0] == state[1]


@pytest.mark.parametrize("name", TRAIN)
def test_killed_and_resumed_is_bitwise_the_run_never_killed(name, config_of, monkeypatch, tmp_path):
    train, make = TRAIN[name], config_of[name]
    train(make("whole", lora_dropout=0.1))
    updates_a_step = 4 if name == "ppo" else 1
    for step in range(1, STEPS + 1):
        config = make(f"killed{step}", lora_dropout=0.1)
        run_until(monkeypatch, train, config, update=step * updates_a_step, error=Killed)
        train(config, resume_from_checkpoint="auto")
        assert_same_run(tmp_path / "whole", tmp_path / f"killed{step}")


def test_with_adapters_on_head_and_token_embedding(sft_config, ppo_config, monkeypatch, tmp_path):
    """Critic and reward model have none. The first epoch trains on the states of its scoring."""
    named = dict(lora_target_modules=["all-linear", "lm_head", "embed_tokens"])
    sft.train(sft_config(max_steps=1, **named))
    start = tmp_path / "sft" / "adapter"
    own = dict(sft_adapter=str(start), micro_batch_size=8, num_mini_batches=1, **named)
    ppo.train(ppo_config("whole", **own))
    config = ppo_config("killed", **own)
    run_until(monkeypatch, ppo.train, config, update=2 * 2 + 2, error=Killed)
    ppo.train(config, resume_from_checkpoint="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    first = next(line for line in lines(tmp_path / "whole", "metrics.jsonl") if "objective/kl" in line)
    assert first["objective/kl"] == 0.0
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (start, tmp_path / "whole" / "policy")]
    for name, tensor in tensors[0].items():
        assert not tensor.equal(tensors[1][name]), name


def test_without_a_critic(ppo_config, monkeypatch, tmp_path):
    own = dict(advantage_estimator="rloo", num_generations=2)
    ppo.train(ppo_config("whole", **own))
    config = ppo_config("killed", **own)
    run_until(monkeypatch, ppo.train, config, update=4 * 2 + 3, error=Killed)
    ppo.train(config, resume_from_checkpoint="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("name", TRAIN)
def test_interrupted_in_the_middle_of_a_step_leaves_the_step_before_it(name, config_of, monkeypatch, tmp_path):
    train, make = TRAIN[name], config_of[name]
    train(make("whole"))
    config = make("interrupted")
    run_until(monkeypatch, train, config, update=4 * 2 + 3 if name == "ppo" else 3, error=KeyboardInterrupt)
    folder = tmp_path / "interrupted"
    assert checkpoint.list_checkpoints(folder)[-1].name == "checkpoint-2"
    train(config, resume_from_checkpoint="auto")
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize("name", TRAIN)
def test_interrupted_in_the_first_step_repeats_no_evaluation(name, config_of, monkeypatch, tmp_path):
    train, make = TRAIN[name], config_of[name]
    train(make("whole"))
    config = make("interrupted")
    run_until(monkeypatch, train, config, update=1, error=KeyboardInterrupt)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "interrupted")] == ["checkpoint-0"]
    train(config, resume_from_checkpoint="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "interrupted")


def test_interrupted_between_periodic_checkpoints_loses_no_finished_step(sft_config, monkeypatch, tmp_path):
    config = sft_config(save_steps=100)
    run_until(monkeypatch, sft.train, config, update=4, error=KeyboardInterrupt)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "sft")] == ["checkpoint-3"]
    assert checkpoint.damage(tmp_path / "sft" / "checkpoint-3") is None


def test_damaged_checkpoint_is_named_and_the_one_before_it_used(sft_config, tmp_path, capsys):
    sft.train(sft_config("whole"))
    config = sft_config("damaged")
    sft.train(config)
    weights = tmp_path / "damaged" / "checkpoint-4" / "sft" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    sft.train(config, resume_from_checkpoint="auto")
    said = capsys.readouterr().err
    assert "checkpoint-4 is damaged (sft/adapter_model.safetensors has changed" in said
    assert "going on after step 2" in said
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")


def test_a_folder_that_holds_another_run_is_refused_then_overwritten(sft_config, tmp_path):
    sft.train(sft_config(max_steps=1))
    (tmp_path / "sft" / "mine.txt").write_text("a file of the user's")
    with pytest.raises(UserError, match="holds another run.*--resume_from_checkpoint auto.*--overwrite_output_dir"):
        sft.train(sft_config(max_steps=1))
    sft.train(sft_config(max_steps=1, overwrite_output_dir=True))
    assert [line["step"] for line in lines(tmp_path / "sft", "metrics.jsonl")].count(1) == 2  # training and validation
    assert (tmp_path / "sft" / "mine.txt").exists()


def test_a_named_checkpoint_is_resumed_even_where_a_newer_one_is_there(sft_config, tmp_path, capsys):
    sft.train(sft_config("whole"))
    config = sft_config("again")
    sft.train(config)
    sft.train(config, resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))
    assert "going on after step 2" in capsys.readouterr().err
    assert_same_run(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("stage", TRAIN)
def test_train_leaves_its_config_as_it_was(stage, config_of):
    config = config_of[stage](max_steps=2)
    before = copy.deepcopy(config)
    TRAIN[stage](config)
    TRAIN[stage](config, resume_from_checkpoint="auto")
    assert config == before
