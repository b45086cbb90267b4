"""Tiny data, tiny configs, and one SFT and one reward model that the PPO tests start from."""

import json
import random
from pathlib import Path

import pytest

from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.recipes import reward, sft

WORDS = "red blue green cat dog sun moon tree bird fish".split()


def rows(count: int) -> list[dict]:
    """Prompts of different lengths; the chosen answer says 'good', the rejected one 'bad'."""
    generator = random.Random(0)
    made = []
    for number in range(count):
        prompt = " ".join(generator.choices(WORDS, k=generator.randint(1, 4))) + f" {number}?"
        made.append(
            {
                "prompt": prompt,
                "chosen": "good " + generator.choice(WORDS),
                "rejected": "bad " + generator.choice(WORDS),
            }
        )
    return made


def write_jsonl(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    made = rows(48)
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in made]
    return {
        "sft": write_jsonl(folder / "sft.jsonl", demonstrations),
        "reward": write_jsonl(folder / "pairs.jsonl", made),
        "ppo": write_jsonl(
            folder / "prompts.jsonl", [{"prompt": row["prompt"], "number": i} for i, row in enumerate(made)]
        ),
    }


COMMON = dict(
    model_name_or_path="tiny-random",
    dtype="float32",
    lora_r=2,
    lora_layers=2,
    max_length=64,
    batch_size=8,
    micro_batch_size=4,
    max_steps=4,
    save_steps=2,
    learning_rate=1e-2,
    eval_size=8,
)


@pytest.fixture(scope="session")
def common() -> dict:
    return COMMON


@pytest.fixture
def sft_config(data, tmp_path):
    return lambda name="sft", **changes: SFTConfig(
        **{**COMMON, "dataset_name": data["sft"], "output_dir": str(tmp_path / name), **changes}
    )


@pytest.fixture
def reward_config(data, tmp_path):
    fixed = dict(dataset_name=data["reward"], calibration_prompts=6, response_length=6)
    return lambda name="reward", **changes: RewardConfig(
        **{**COMMON, **fixed, "output_dir": str(tmp_path / name), **changes}
    )


@pytest.fixture
def dpo_config(data, tmp_path):
    return lambda name="dpo", **changes: DPOConfig(
        **{**COMMON, "dataset_name": data["reward"], "output_dir": str(tmp_path / name), **changes}
    )


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory) -> dict[str, str]:
    """The adapter folders of one SFT and one reward run."""
    folder = tmp_path_factory.mktemp("trained")
    sft.train(SFTConfig(**{**COMMON, "dataset_name": data["sft"], "output_dir": str(folder / "sft")}))
    adapter = str(folder / "sft" / "adapter")
    fixed = dict(sft_adapter=adapter, calibration_prompts=6, response_length=6, output_dir=str(folder / "reward"))
    reward.train(RewardConfig(**{**COMMON, **fixed, "dataset_name": data["reward"]}))
    return {"sft_adapter": adapter, "reward_adapter": str(folder / "reward" / "adapter")}


@pytest.fixture
def ppo_config(data, trained, tmp_path):
    fixed = dict(
        dataset_name=data["ppo"], response_length=6, num_ppo_epochs=2, num_mini_batches=2, eval_prompts=4, **trained
    )
    return lambda name="ppo", **changes: PPOConfig(**{**COMMON, **fixed, "output_dir": str(tmp_path / name), **changes})
