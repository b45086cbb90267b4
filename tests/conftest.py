"""The command line in this process, on the tiny model, with small data files in the working folder."""

import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlhf_fast.cli import main

COMMON = "--model_name_or_path tiny-random --batch_size 4 --micro_batch_size 2 --max_steps 2 --max_length 64"
OWN = {
    "sft": "--dataset_name sft.jsonl --output_dir out",
    "reward": "--dataset_name pairs.jsonl --output_dir out --response_length 8 --calibration_prompts 4",
    "ppo": "--dataset_name prompts.jsonl --output_dir out --response_length 8 --sft_adapter {sft} "
    "--reward_adapter {reward}",
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path) -> None:
    numbers = range(12)
    write_jsonl(folder / "sft.jsonl", [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in numbers])
    write_jsonl(folder / "pairs.jsonl", [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in numbers])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"q{i}"} for i in numbers])


def arguments(stage: str, flags: str, adapters: dict[str, str]) -> list[str]:
    """A stage's command line with small settings; what ``flags`` names again wins."""
    own = OWN[stage].format(**adapters)
    return [stage, *shlex.split(f"{COMMON} {own} {flags.format(**adapters)}")]


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Stage -> the adapter folder of one short run."""
    folder = tmp_path_factory.mktemp("tiny_adapters")
    made: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_data(folder)
        for stage in ("sft", "reward"):
            assert main([*arguments(stage, "", made), "--output_dir", stage]) == 0
            made[stage] = str(folder / stage / "adapter")
    return made


@pytest.fixture
def command(
    tmp_path: Path, tiny_adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """``command(stage, flags)`` in a folder with data; ``{sft}`` and ``{reward}`` in flags are adapter folders."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)

    def run(stage: str, flags: str = "") -> Outcome:
        capsys.readouterr()
        code = main(arguments(stage, flags, tiny_adapters) if stage in OWN else [stage, *shlex.split(flags)])
        return Outcome(code, *capsys.readouterr())

    return run
