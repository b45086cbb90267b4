"""Command lines with small settings, and the data files that they name."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COMMON = (
    "--model_name_or_path tiny-random --dtype float32 --batch_size 4 --micro_batch_size 2 --max_steps 2 --max_length 64"
)
OWN = {
    "sft": "--dataset_name sft.jsonl --output_dir out",
    "reward": "--dataset_name pairs.jsonl --output_dir out --response_length 8 --calibration_prompts 4",
    "dpo": "--dataset_name pairs.jsonl --output_dir out --sft_adapter {sft}",
    "ppo": "--dataset_name prompts.jsonl --output_dir out --response_length 8 --sft_adapter {sft} "
    "--reward_adapter {reward}",
}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path) -> None:
    numbers = range(12)
    write_jsonl(folder / "sft.jsonl", [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in numbers])
    write_jsonl(folder / "pairs.jsonl", [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in numbers])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"q{i}"} for i in numbers])


def arguments(stage: str, flags: str, adapters: dict[str, str]) -> list[str]:
    """A stage's command line with small settings; ``flags`` override them."""
    own = OWN[stage].format(**adapters)
    return [stage, *shlex.split(f"{COMMON} {own} {flags.format(**adapters)}")]
