"""`make bench-learning`: what PPO learns, ours beside TRL's: one Python reward, the same model, prompts and settings.

    python -m rlhf_fast.bench.step.learning --model FOLDER [--json bench/results/learning.json] [--chart FILE.png]

Every run, a trainer with a seed, is a process of its own; TRL's is in .venv-trl, which `make bench-learning` installs.
The file is written after each run, and a run that it has already is not done again.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_fast.bench.results import machine
from rlhf_fast.bench.step import curves, python_reward
from rlhf_fast.bench.step.contest import BF16, Row
from rlhf_fast.bench.step.process import Failed
from rlhf_fast.bench.step.runs import PYTHON, missing, run_row, versions
from rlhf_fast.bench.step.work import Work, prepare, quick, without_paths

REWARD = Path(python_reward.__file__)
STEPS, SEEDS, RESPONSE_LENGTH, LEARNING_RATE = 40, 3, 24, 3e-4
# The settings of both beside those of the work. Where a default differs, one of the two is taken for both.
ALIKE = {
    "temperature": 1.0,
    "kl_estimator": "k1",
    "kl_coef": 0.05,
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_rewards": False,
    "lr_scheduler_type": "constant_with_warmup",
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
}
CLIP, VALUE_WEIGHT = 0.2, 0.1
OURS = {"clip_low": CLIP, "clip_high": CLIP, "value_clip": CLIP, "value_coef": VALUE_WEIGHT}
TRL = {"cliprange": CLIP, "cliprange_value": CLIP, "vf_coef": VALUE_WEIGHT}
# What TRL does not have, switched off; it has no warm-up where none is set, and clips no gradient.
OURS_ALONE = {"kl_target": None, "missing_eos_penalty": 0.0, "warmup_ratio": 0.0, "max_grad_norm": 1e9}
# our and TRL's name of what is kept of each step
KEPT = {
    "reward": "objective/scores",
    "kl": "objective/kl",
    "objective": "objective/rlhf_reward",
    "length": "response/length_mean",
    "explained_variance": "critic/explained_variance",
}


def main() -> None:
    args = arguments()
    work = Work(args.model, response_length=RESPONSE_LENGTH, learning_rate=LEARNING_RATE, steps=STEPS)
    if args.quick:
        work = replace(quick(args.model), steps=2)
    with tempfile.TemporaryDirectory(prefix="rlhf-fast-learning-") as folder:
        measured, failed = measure(work, args, Path(folder))
    print(f"\n{curves.table(measured)}")
    if args.chart:
        curves.draw(measured, args.chart)
    if failed:
        raise SystemExit("\n".join(failed))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.step.learning", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the base: a folder of a Llama-style model")
    parser.add_argument("--json", type=Path, help="write every run here, after each of them; go on from what it has")
    parser.add_argument("--chart", type=Path, help="draw the curves here, as PNG")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each trainer, in turn")
    parser.add_argument("--quick", action="store_true", help="two steps of small sizes, for a tiny model")
    return parser.parse_args()


def measure(work: Work, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """All runs, those of --json included, and why others failed."""
    work_file = prepare(work, None, folder)
    measured: dict[str, Any] = {
        "machine": machine(),
        "versions": {who: versions(PYTHON[who]) for who in ("rlhf-fast", "trl") if PYTHON[who].exists()},
        "quick": args.quick,
        "work": without_paths(work),
        "reward": python_reward.__doc__,
        "settings": {"both": ALIKE, "rlhf-fast": OURS | OURS_ALONE, "trl": TRL},
        "curves": [],
    }
    if args.json and args.json.exists():
        measured["curves"] = earlier(args.json, measured)
    done, failed = {(curve["who"], curve["seed"]) for curve in measured["curves"]}, []
    for seed, row in rows(work, args.seeds, folder):
        if (row.who, seed) in done:
            continue
        try:
            if reason := missing(row):
                raise Failed(reason)
            lines, _, _ = run_row(row, str(seed), work, work_file, folder)
        except Failed as error:
            failed.append(f"{row.key}, seed {seed}: {error}")
            print(failed[-1], flush=True)
            continue
        kept = {name: [round(line[key], 4) for line in lines] for name, key in KEPT.items() if key in lines[0]}
        measured["curves"].append({"who": row.who, "seed": seed, **kept})
        print(json.dumps(measured["curves"][-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(measured, indent=1) + "\n")
    return measured, failed


def earlier(path: Path, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of an earlier call. Raises SystemExit where they were made with other settings."""
    found = json.loads(path.read_text())
    for name in ("quick", "work", "reward", "settings"):
        if found[name] != json.loads(json.dumps(measured[name])):
            raise SystemExit(f"{path}: its runs were made with other {name}; name another file, or delete it")
    return found["curves"]


def rows(work: Work, seeds: int, folder: Path) -> Iterator[tuple[int, Row]]:
    """The runs in turn: both trainers with a seed, then with the next."""
    for seed in range(seeds):
        flags = ALIKE | OURS | OURS_ALONE | {"seed": seed, "lora_alpha": 2 * work.lora_r}
        flags |= {"micro_batch_size": work.batch_size, "reward_functions": f"{REWARD}:score"}
        yield (
            seed,
            Row(
                "ours",
                "rlhf-fast",
                "ppo",
                "rlhf-fast",
                BF16,
                {name: json.dumps(value).strip('"') for name, value in flags.items()},
            ),
        )
        path = folder / f"trl-{seed}.json"
        # The whole batch at once. In parts, Accelerate would take an optimizer step after each, since its data loader
        # is at its last batch, which is also its first.
        whole = {"per_device_train_batch_size": work.batch_size, "gradient_accumulation_steps": 1}
        path.write_text(json.dumps({"reward": str(REWARD), "settings": ALIKE | TRL | whole | {"seed": seed}}))
        yield seed, Row("trl", "TRL", "ppo", "trl", BF16, {"learning": str(path)})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trainer's process is stopped too
    main()
