"""Stages on the tiny model, with small data files."""

from pathlib import Path
from typing import Any

import pytest
from command_lines import write_jsonl
from sound_stages import OWN, TINY, rows_of

from rlhf_fast.config import STAGES
from rlhf_fast.doctor.examine import with_micro_batches
from rlhf_fast.doctor.subject import StageData, opened, read_stage


@pytest.fixture
def data_of(tmp_path: Path):
    """``data_of(stage, rows, **settings)``: the stage's data; ``rows`` None: sound ones."""

    def make(stage: str, rows: list[dict[str, Any]] | None = None, **settings: Any) -> StageData:
        file = tmp_path / f"{stage}.jsonl"
        write_jsonl(file, rows_of(stage) if rows is None else rows)
        given = TINY | OWN[stage] | {"dataset_name": str(file), "output_dir": str(tmp_path / "out" / stage)}
        if stage == "ppo" and not settings.keys() & {"reward_functions", "reward_adapter"}:
            given["reward_adapter"] = str(tmp_path / "out" / "reward" / "adapter")
        config = STAGES[stage](**(given | settings))
        config.validate()
        return read_stage(stage, with_micro_batches(config))

    return make


@pytest.fixture
def ppo(data_of, tmp_path: Path):
    """PPO's model with all roles; SFT and reward adapters are stand-ins."""
    data = data_of("ppo", sft_adapter=str(tmp_path / "out" / "sft" / "adapter"), max_length=96)
    with opened(data, {"sft", "reward"}) as stage:
        yield stage
