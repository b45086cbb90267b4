"""Records the runs of tests/monitor/corpus: healthy ones, and each failure provoked in the real trainer.

    python tests/monitor/record.py [--only NAME] [--held-out]

A run is a file of columns: {"verdict", "onset", "setting", "metrics": {name: [values by step]}}; "verdict" is the name
that the monitor must give it ("" where it must give none), "onset" the step from which the setting works.
"""

import argparse
import contextlib
import functools
import json
import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from rlhf_fast.cli import main
from rlhf_fast.recipes import ppo, stage

CORPUS = Path(__file__).parent / "corpus"
REWARDS = Path(__file__).parent / "corpus_rewards.py"
TINY = (
    "ppo --model_name_or_path tiny-random --dtype float32 --lora_r 8 --learning_rate 1e-3 --batch_size 32 "
    "--micro_batch_size 32 --response_length 16 --max_length 128 --max_steps 30 --dataset_name demo/prompts "
    "--max_samples 128 --num_ppo_epochs 2 --num_mini_batches 1 --kl_target 2 --kl_horizon 400 --save_steps 1000 "
    "--eval_size 0 --value_coef 0.5 --value_clip 1000 "
)
NO_END = "--ignore_eos true "
LETTERS = f"--reward_functions {REWARDS}:letters --eval_functions {REWARDS}:variety "
PAIRS = (
    "reward --model_name_or_path smollm2-135m-instruct --lora_layers 8 --learning_rate 3e-4 --batch_size 16 "
    "--micro_batch_size 16 --max_length 96 --max_steps 30 --max_samples 600 --response_length 8 "
    "--calibration_prompts 4 "
    "--eval_steps 10 --save_steps 1000 --eval_dataset_name {pairs} "
)
DEMO = (
    "ppo --model_name_or_path smollm2-135m-instruct --lora_layers 8 --learning_rate 6e-4 --batch_size 24 "
    "--micro_batch_size 24 --response_length 24 --max_length 96 --max_steps 25 --dataset_name demo/prompts "
    "--num_ppo_epochs 2 --num_mini_batches 1 --kl_target 3 --kl_horizon 80 --save_steps 1000 --eval_size 0 "
    "--value_coef 0.5 --value_clip 1000 "
)
GOLD = "--reward_functions rlhf_fast.data.demo.gold:gold "


@contextlib.contextmanager
def as_it_is() -> Iterator[None]:
    yield


@contextlib.contextmanager
def sampled_at(temperature: float) -> Iterator[None]:
    """Responses come from another temperature than the one that is trained."""
    generate = functools.partial(ppo.generate)

    def hotter(*arguments, **options):
        return generate(*arguments, **options | {"temperature": temperature})

    with mock.patch.object(ppo, "generate", hotter):
        yield


@contextlib.contextmanager
def never_ending() -> Iterator[None]:
    """The stop tokens are ones that the model never says."""
    opened = stage.open_base

    def without_end(*arguments):
        base, digest = opened(*arguments)
        base.stop_ids = [base.pad_id]
        return base, digest

    with mock.patch.object(stage, "open_base", without_end):
        yield


@contextlib.contextmanager
def scores_of(mean: float, scale: float) -> Iterator[None]:
    """The reward model's scores have lost their calibration."""
    score = ppo.score

    def shifted(*arguments, **options):
        experience = score(*arguments, **options)
        experience.scores = experience.scores * scale + mean
        return experience

    with mock.patch.object(ppo, "score", shifted):
        yield


@dataclass(frozen=True)
class Setting:
    """One failure, or a healthy run: its command line, what stands in the way, and from which step on it works."""

    verdict: str
    flags: str
    inside: Callable[[], contextlib.AbstractContextManager[None]] = as_it_is
    onset: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)


SETTINGS = {
    "healthy": Setting("", TINY + NO_END + LETTERS, seeds=(0, 1, 2, 3)),
    "healthy_groups": Setting(
        "",
        TINY.replace("--value_coef 0.5 --value_clip 1000 ", "")
        + NO_END
        + LETTERS
        + "--advantage_estimator rloo --num_generations 4 ",
    ),
    "kl_explosion": Setting("kl_explosion", TINY + NO_END + LETTERS + "--learning_rate 0.05 "),
    "reward_hacking": Setting(
        "reward_hacking",
        TINY
        + NO_END
        + f"--kl_coef 0 --kl_target null --learning_rate 4e-3 --reward_functions {REWARDS}:vowels "
        + f"--eval_functions {REWARDS}:variety ",
    ),
    "mode_collapse": Setting(
        "mode_collapse",
        TINY + NO_END + f"--kl_coef 0 --kl_target null --learning_rate 1e-2 --reward_functions {REWARDS}:one_letter ",
    ),
    "not_learning": Setting("not_learning", TINY + NO_END + LETTERS + "--learning_rate 1e-7 "),
    "useless_critic": Setting("useless_critic", TINY + NO_END + LETTERS + "--value_coef 0 "),
    "sampler_mismatch": Setting("sampler_mismatch", TINY + NO_END + LETTERS, lambda: sampled_at(0.7)),
    "no_signal": Setting("no_signal", TINY + NO_END + f"--reward_functions {REWARDS}:constant "),
    "truncation": Setting("truncation", TINY + LETTERS + "--missing_eos_penalty 0 ", never_ending),
}


def record(name: str, setting: Setting, seed: int, folder: Path) -> Path:
    """Runs the setting with a seed and writes its metrics."""
    with tempfile.TemporaryDirectory() as work, setting.inside():
        flags = shlex.split(setting.flags)
        code = main([*flags, "--output_dir", work, "--overwrite_output_dir", "true", "--seed", str(seed)])
        if code != 0:
            raise SystemExit(f"{name}, seed {seed}: the run ended with code {code}")
        lines = [json.loads(line) for line in (Path(work) / "metrics.jsonl").read_text().splitlines()]
    path = folder / f"{name}-{seed}.json"
    held = {
        "verdict": setting.verdict,
        "onset": setting.onset,
        "setting": setting.flags.replace(str(CORPUS.parent), "."),
    }
    path.write_text(json.dumps(held | {"metrics": columns(lines)}, separators=(",", ":")) + "\n")
    return path


def columns(lines: list[dict]) -> dict[str, list]:
    """Name -> its values by step, with None for gaps; without times and memory, which are the machine's."""
    steps = sorted({line["step"] for line in lines})
    merged = {step: {} for step in steps}
    for line in lines:
        merged[line["step"]] |= line
    names = {name for line in lines for name in line if not name.startswith("perf/")}
    return {name: [_short(merged[step].get(name)) for step in steps] for name in sorted(names)}


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="names of settings, A,B")
    parser.add_argument("--seeds", help="in place of the settings' own, 0,1")
    parser.add_argument("--into", type=Path, default=CORPUS)
    args = parser.parse_args()
    for name in args.only.split(",") if args.only else SETTINGS:
        setting = SETTINGS[name]
        for seed in map(int, args.seeds.split(",")) if args.seeds else setting.seeds:
            print(record(name, setting, seed, args.into), flush=True)
