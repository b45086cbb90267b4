"""Two processes: every recipe runs, and SFT and reward model give the same figures as with one process.

One process goes through `accelerate launch`. Two go through torchrun, whose variables accelerate reads: on a CPU,
`accelerate launch` itself starts several processes through MPI alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

LAUNCH = ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
FIGURES = {"loss", "grad_norm", "eval_loss", "eval_accuracy", "lr"}


@pytest.fixture(scope="module")
def runs(data, common, tmp_path_factory) -> dict[int, Path]:
    """The same run of all three stages by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    ppo = dict(dataset_name=data["ppo"], response_length=6, num_ppo_epochs=2, num_mini_batches=1, eval_prompts=4)
    document = {
        **common,
        "max_steps": 2,
        "sft": {"dataset_name": data["sft"]},
        "reward": {"dataset_name": data["reward"], "calibration_prompts": 6, "response_length": 6},
        "ppo": ppo,
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(document))
    found = {count: folder / f"processes{count}" for count in (1, 2)}
    for launch, output in zip((LAUNCH, TORCHRUN), found.values(), strict=True):
        run(launch, ["run", f"--config={config}", f"--output_dir={output}"])
    return found


def run(launch: list[str], arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "rlhf_fast.cli", *arguments, "--debug"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sft_and_reward_figures_do_not_depend_on_the_number_of_processes(runs):
    for stage in ("sft", "reward"):
        one, two = metrics(runs[1] / stage), metrics(runs[2] / stage)
        assert len(one) == len(two) >= 4
        for left, right in zip(one, two, strict=True):
            assert left["step"] == right["step"]
            assert left.keys() == right.keys()
            for name in left.keys() & FIGURES:
                assert left[name] == pytest.approx(right[name], rel=1e-4), (stage, name)


def test_sft_adapters_are_the_same(runs):
    one, two = (load_file(runs[count] / "sft" / "adapter" / "adapter_model.safetensors") for count in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


def test_ppo_counts_every_process_once(runs):
    lines = [line for line in metrics(runs[2] / "ppo") if "objective/kl" in line]
    assert [line["episode"] for line in lines] == [8, 16]
    for line in lines:
        assert line["val/num_eos_tokens"] + 8 * line["response/truncated"] == pytest.approx(8)
        assert line["response/length_mean"] <= 6
    assert lines[0]["objective/kl"] == 0.0
    samples = [json.loads(line) for line in (runs[2] / "ppo" / "samples.jsonl").read_text().splitlines()]
    first = [row["index"] for row in samples if row["split"] == "eval" and row["step"] == 0]
    assert len(first) == len(set(first)) == 4


def test_the_responses_to_one_prompt_stay_in_one_process(data, common, tmp_path):
    """Five prompts over two processes. Equal scores within each prompt leave nothing to learn, in either process."""
    (tmp_path / "reward.py").write_text("def prompt(prompts, completions):\n    return [len(p) for p in prompts]\n")
    settings = {**common, "batch_size": 15, "micro_batch_size": 2, "max_steps": 1, "eval_size": 0}
    settings |= {"dataset_name": data["ppo"], "response_length": 6, "num_ppo_epochs": 1, "num_generations": 3}
    settings |= {"missing_eos_penalty": 0.0}
    settings |= {"advantage_estimator": "reinforce++-baseline", "reward_functions": [f"{tmp_path}/reward.py:prompt"]}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(settings))
    run(TORCHRUN, ["ppo", f"--config={tmp_path}/ppo.yaml", f"--output_dir={tmp_path}/out"])
    (line,) = [line for line in metrics(tmp_path / "out") if "objective/kl" in line]
    assert line["frac_reward_zero_std"] == 1.0 and line["grad_norm"] == 0.0


def test_a_checkpoint_of_two_processes_is_refused_by_one(runs, capsys):
    from rlhf_fast.cli import main

    config = runs[2] / "sft" / "config.yaml"
    checkpoint = runs[2] / "sft" / "checkpoint-2"
    arguments = ["sft", f"--config={config}", f"--resume_from_checkpoint={checkpoint}"]
    assert main(arguments) == 2
    assert "was written by 2 processes and this run has 1" in capsys.readouterr().err
