"""A row's run: the command, the process, and what it wrote of each step."""

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import rlhf_fast
from rlhf_fast.bench.step.contest import SEPARATE_REWARD, Row
from rlhf_fast.bench.step.process import run
from rlhf_fast.bench.step.work import Work

ROOT = Path(rlhf_fast.__file__).parent.parent
SCRIPTS = Path(__file__).parent
PYTHON = {
    "rlhf-fast": Path(sys.executable),
    "peft": Path(sys.executable),
    "trl": ROOT / ".venv-trl" / "bin" / "python",
    "agilerl": ROOT / ".venv-agilerl" / "bin" / "python",
}
PACKAGES = ("torch", "transformers", "peft", "trl", "agilerl")
# who -> script, and whether it wants the stage's name
PEERS = {"trl": ("trl_step.py", True), "agilerl": ("agilerl_ppo.py", False), "peft": ("peft_generate.py", False)}
SECONDS_A_STEP = 600  # no step takes this long: a process that does hangs


def missing(row: Row) -> str | None:
    """What the row's environment lacks."""
    python = PYTHON[row.who]
    return None if python.exists() else f"no {row.who} in {python.relative_to(ROOT)}"


def run_row(
    row: Row, name: str, work: Work, work_file: Path, folder: Path
) -> tuple[list[dict[str, Any]], float, float]:
    """The metrics of every step, the peak memory in GB, and the seconds of the process. ``name``: of this run of the
    row. Raises Failed."""
    output = folder / f"{row.key}-{name}"
    output.mkdir()
    steps = 1 if work.steps == 1 else row.steps or work.steps
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "datasets"), "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment |= {"RLHF_FAST_STEP_WORK": str(work_file), "RLHF_FAST_STEP_DTYPE": row.dtype}
    if row.who == "rlhf-fast":
        command = our_command(row, work, steps, output)
        if row.stage == "ppo":
            command += reward_flags(row, work, folder, environment)
    else:
        environment.pop("PYTHONPATH", None)
        script, stage = PEERS[row.who]
        command = [str(PYTHON[row.who]), "-P", str(SCRIPTS / script), *([row.stage] if stage else [])]
        command += [str(work_file), str(output), "--dtype", row.dtype, "--steps", str(steps)]
        command += [word for name, value in row.flags.items() for word in (f"--{name}", value) if word]
    start = perf_counter()
    peak = run(command, output.with_suffix(".log"), environment, SECONDS_A_STEP * (1 + steps))
    seconds = perf_counter() - start
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "perf/seconds_step" in line], peak, seconds


def our_command(row: Row, work: Work, steps: int, output: Path) -> list[str]:
    flags = {
        "model_name_or_path": work.model,
        "dataset_name": {"ppo": work.prompts, "sft": work.sft, "reward": work.reward, "dpo": work.reward}[row.stage],
        "output_dir": str(output),
        "overwrite_output_dir": "true",
        "dtype": row.dtype,
        "eval_size": "0",
        "batch_size": str(work.batch_size),
        "micro_batch_size": str(work.train_micro_batch),
        "max_length": str(work.max_length),
        "max_steps": str(steps),
        "save_steps": str(steps),
        "lora_r": str(work.lora_r),
        "learning_rate": str(work.learning_rate),
    }
    if row.stage == "ppo":
        flags |= {"max_length": str(work.prompt_tokens[1] + work.response_length), "ignore_eos": "true"}
        flags |= {"response_length": str(work.response_length), "num_ppo_epochs": str(work.ppo_epochs)}
    if row.stage == "reward":
        flags |= CALIBRATION
    flags |= row.flags
    return [sys.executable, "-m", "rlhf_fast.cli", row.stage, *(f"--{name}={value}" for name, value in flags.items())]


CALIBRATION = {"calibration_prompts": "2", "response_length": "4"}  # not what is measured here: kept short


def reward_flags(row: Row, work: Work, folder: Path, environment: dict[str, str]) -> list[str]:
    """The reward: functions that the row names, a model of its own, or an adapter on the base, made where it is first
    needed."""
    if "reward_functions" in row.flags:
        return []
    if row.name == SEPARATE_REWARD:
        return [f"--reward_functions={SCRIPTS / 'separate_reward.py'}:score"]
    layers = row.flags.get("lora_layers")
    output = folder / f"reward-adapter-{row.dtype}-{layers}"
    if not output.exists():
        making = Row("", "", "reward", "rlhf-fast", row.dtype, {"lora_layers": layers} if layers else {})
        run(our_command(making, work, 1, output), output.with_suffix(".log"), environment, 2 * SECONDS_A_STEP)
    return [f"--reward_adapter={output / 'adapter'}"]


def versions(python: Path) -> dict[str, str]:
    """The packages of an environment that take part."""
    code = (
        "import importlib.metadata as m, json; "
        f"names = {{d.metadata['Name'].lower() for d in m.distributions()}} & set({PACKAGES!r}); "
        "print(json.dumps({name: m.version(name) for name in sorted(names)}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
