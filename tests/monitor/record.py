"""Records the runs of tests/monitor/corpus: healthy ones, and each failure provoked in the real trainer.

    python tests/monitor/record.py [--only NAME] [--held-out]
    python tests/monitor/record.py --score        -> the table of docs/debugging.md: what is found in the second set

A run is a file of columns: {"verdict", "onset", "setting", "metrics": {name: [values by step]}}; "verdict" is the name
that the monitor must give it ("" where it must give none), "onset" the step from which the setting works.
"""

import argparse
import contextlib
import functools
import json
import random
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from rlhf_fast.cli import main
from rlhf_fast.monitor import Monitor
from rlhf_fast.recipes import ppo, stage

CORPUS = Path(__file__).parent / "corpus"
REWARDS = Path(__file__).parent / "corpus_rewards.py"
MODEL = "--model_name_or_path tiny-random --dtype float32 --lora_r 8 --max_length 128 --save_steps 1000 "
TINY = (
    f"ppo {MODEL} --lora_layers 2 --learning_rate 1e-3 --batch_size 24 --micro_batch_size 24 --response_length 16 "
    "--max_steps 28 --dataset_name demo/prompts --max_samples 128 --num_ppo_epochs 2 --kl_target 6 --kl_horizon 200 "
    "--eval_size 0 --value_coef 1 --value_clip 1000 "
)
DEMO = (
    "ppo --model_name_or_path smollm2-135m-instruct --lora_layers 8 --learning_rate 6e-4 --batch_size 16 "
    "--micro_batch_size 16 --response_length 20 --max_length 96 --max_steps 24 --dataset_name demo/prompts "
    "--num_ppo_epochs 2 --kl_target 4 --kl_horizon 100 --eval_size 0 --save_steps 1000 --ignore_eos true "
    "--advantage_estimator rloo --num_generations 4 "
)
GOLD = "rlhf_fast.data.demo.gold:gold "
NO_END = "--ignore_eos true "
LETTERS = f"--reward_functions {REWARDS}:letters --eval_functions {REWARDS}:variety "
FREE = "--kl_coef 0 --kl_target null "
NO_CRITIC = "--advantage_estimator rloo --num_generations 4 --value_coef 0.1 --value_clip 0.2 "
PAIRS = (
    f"reward {MODEL} --learning_rate 2e-3 --batch_size 16 --micro_batch_size 16 --max_steps 28 --response_length 8 "
    "--calibration_prompts 64 --eval_steps 7 --eval_dataset_name {held_out} "
)
SFT = f"sft {MODEL} --learning_rate 2e-3 --batch_size 16 --micro_batch_size 16 --max_steps 40 --dataset_name {{short}} "
# Answers of a few letters, so that the policy ends its responses.
SHORT = "--sft_adapter {sft} --response_length 40 --dataset_name {short} --missing_eos_penalty 0 "
JUDGED = "--sft_adapter {sft} --reward_adapter {reward} --dataset_name {short} --response_length 24 "


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
        base.stop_ids = [base.vocab_size + 1]
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
    "healthy": Setting("", TINY + NO_END + LETTERS + "--learning_rate 2e-3 "),
    "healthy_short": Setting("", TINY + SHORT + LETTERS),
    "healthy_judged": Setting("", TINY + JUDGED),
    "healthy_groups": Setting("", TINY + NO_END + LETTERS + NO_CRITIC + "--learning_rate 2e-3 "),
    "healthy_reward": Setting("", PAIRS + "--dataset_name {pairs} "),
    "healthy_sft": Setting("", SFT),
    "kl_explosion": Setting("kl_explosion", TINY + NO_END + LETTERS + "--learning_rate 0.1 --kl_target 1.5 "),
    "reward_hacking": Setting(
        "reward_hacking",
        TINY
        + NO_END
        + FREE
        + f"--learning_rate 0.01 --reward_functions {REWARDS}:vowels --eval_functions {REWARDS}:variety ",
    ),
    "mode_collapse": Setting(
        "mode_collapse",
        TINY
        + NO_END
        + FREE
        + "--learning_rate 0.02 --num_ppo_epochs 4 --lora_target_modules all-linear,lm_head "
        + f"--reward_functions {REWARDS}:one_letter ",
    ),
    "not_learning": Setting("not_learning", TINY + NO_END + LETTERS + "--learning_rate 1e-7 "),
    "useless_critic": Setting("useless_critic", TINY + NO_END + LETTERS + "--value_coef 0 "),
    "miscalibrated_scores": Setting("miscalibrated_reward", TINY + JUDGED, lambda: scores_of(2.0, 4.0)),
    "swapped_labels": Setting("miscalibrated_reward", PAIRS + "--dataset_name {swapped} "),
    "sampler_mismatch": Setting("sampler_mismatch", TINY + NO_END + LETTERS, lambda: sampled_at(0.7)),
    "length_exploitation": Setting(
        "length_exploitation",
        TINY
        + SHORT
        + FREE
        + f"--learning_rate 0.005 --reward_functions {REWARDS}:length --eval_functions {REWARDS}:brevity ",
    ),
    "no_signal": Setting("no_signal", TINY + NO_END + f"--reward_functions {REWARDS}:constant "),
    "truncation": Setting("truncation", TINY + SHORT + LETTERS, never_ending),
    "demo_healthy": Setting("", DEMO + f"--reward_functions {GOLD}", seeds=(0, 1)),
    "demo_kl_explosion": Setting("kl_explosion", DEMO + f"--reward_functions {GOLD}--learning_rate 0.02 ", seeds=(0,)),
    "demo_sampler_mismatch": Setting(
        "sampler_mismatch", DEMO + f"--reward_functions {GOLD}", lambda: sampled_at(0.7), seeds=(0,)
    ),
    "demo_reward_hacking": Setting(
        "reward_hacking",
        DEMO + FREE + f"--learning_rate 2e-3 --reward_functions {REWARDS}:the --eval_functions {GOLD}",
        seeds=(0,),
    ),
}

# Other settings and seeds, which no threshold was set by: scored once, into docs/debugging.md.
HELD_OUT = {
    name: Setting(SETTINGS[like].verdict, SETTINGS[like].flags + more, inside or SETTINGS[like].inside, seeds=(10, 11))
    for name, like, more, inside in (
        ("healthy", "healthy", "--batch_size 32 --response_length 12 --learning_rate 1.5e-3 ", None),
        ("healthy_short", "healthy_short", "--kl_target 4 --num_ppo_epochs 3 ", None),
        ("healthy_judged", "healthy_judged", "--learning_rate 5e-4 --batch_size 32 ", None),
        ("healthy_groups", "healthy_groups", "--advantage_estimator grpo --num_generations 6 ", None),
        ("kl_explosion", "kl_explosion", "--learning_rate 0.05 --batch_size 16 ", None),
        ("reward_hacking", "reward_hacking", "--learning_rate 0.015 --batch_size 32 ", None),
        ("mode_collapse", "mode_collapse", "--learning_rate 0.01 ", None),
        ("not_learning", "not_learning", "--learning_rate 1e-6 --batch_size 32 ", None),
        ("useless_critic", "useless_critic", "--value_coef 0.0001 --learning_rate 5e-4 ", None),
        ("miscalibrated_scores", "miscalibrated_scores", "", lambda: scores_of(-1.5, 0.2)),
        ("swapped_labels", "swapped_labels", "--batch_size 8 --learning_rate 1e-3 ", None),
        ("sampler_mismatch", "sampler_mismatch", "", lambda: sampled_at(1.5)),
        ("length_exploitation", "length_exploitation", "--learning_rate 0.002 ", None),
        ("no_signal", "no_signal", "--learning_rate 3e-3 --batch_size 16 ", None),
        ("truncation", "truncation", "--response_length 24 ", None),
    )
}


def prepare(folder: Path) -> dict[str, str]:
    """Data, an SFT adapter and a reward adapter that the settings name."""
    generator = random.Random(0)
    words = "red blue green cat dog sun moon tree bird fish".split()
    prompts = [f"{generator.choice(words)} {generator.choice(words)} {number}?" for number in range(400)]
    pairs = [
        {"prompt": prompt, "chosen": f"good {generator.choice(words)}", "rejected": f"bad {generator.choice(words)}"}
        for prompt in prompts
    ]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    short = [{"prompt": prompt, "completion": generator.choice(words)} for prompt in prompts]
    names = {}
    data = {"pairs": pairs[100:], "swapped": swapped[100:], "held_out": pairs[:100], "short": short}
    for name, rows in data.items():
        names[name] = str(folder / f"{name}.jsonl")
        Path(names[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, flags in (("sft", SFT), ("reward", PAIRS + "--dataset_name {pairs} ")):
        run(flags.format(**names), folder / name)
        names[name] = str(folder / name / "adapter")
    return names


def run(flags: str, output: Path, *more: str) -> list[dict]:
    """Runs a command line; returns its lines of metrics."""
    code = main([*shlex.split(flags), "--output_dir", str(output), "--overwrite_output_dir", "true", *more])
    if code != 0:
        raise SystemExit(f"the run ended with code {code}: {flags}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def record(name: str, setting: Setting, seed: int, inputs: dict[str, str], folder: Path) -> Path:
    """Runs the setting with a seed and writes its metrics."""
    with tempfile.TemporaryDirectory() as work, setting.inside():
        lines = run(setting.flags.format(**inputs), Path(work), "--seed", str(seed))
    path = folder / f"{name}-{seed}.json"
    flags = setting.flags.replace(str(CORPUS.parent), ".")
    held = {"verdict": setting.verdict, "onset": setting.onset, "setting": flags, "metrics": columns(lines)}
    path.write_text(json.dumps(held, separators=(",", ":")) + "\n")
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


def score(folder: Path) -> str:
    """What the monitor finds in each run of ``folder``, as a table."""
    found: dict[tuple[str, str], list[dict[str, int]]] = {}
    for path in sorted(folder.glob("*.json")):
        held = json.loads(path.read_text())
        found.setdefault((path.stem.rpartition("-")[0], held["verdict"]), []).append(first_found(held))
    lines = ["| setting | wanted | runs | found, by step | also told |", "| --- | --- | --- | --- | --- |"]
    for (name, wanted), runs in found.items():
        right = [str(told[wanted]) if wanted in told else "not found" for told in runs] if wanted else []
        others = Counter(name for told in runs for name in told if name != wanted)
        also = ", ".join(f"`{name}` in {count}" for name, count in others.most_common())
        lines.append(f"| {name} | {f'`{wanted}`' if wanted else 'none'} | {len(runs)} | {', '.join(right)} | {also} |")
    return "\n".join(lines)


def first_found(run: dict) -> dict[str, int]:
    """Verdict -> the step at which the monitor tells it."""
    monitor, found = Monitor(), {}
    columns = run["metrics"]
    for index, step in enumerate(columns["step"]):
        line = {name: values[index] for name, values in columns.items() if values[index] is not None}
        for verdict in monitor.update(step, line):
            found[verdict.name] = step
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="names of settings, A,B")
    parser.add_argument("--seeds", help="in place of the settings' own, 0,1")
    parser.add_argument("--held-out", action="store_true", help="the second set")
    parser.add_argument("--score", action="store_true", help="record nothing: score the second set")
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    if args.score:
        print(score(CORPUS / "held_out"))
        raise SystemExit
    settings, into = (HELD_OUT, CORPUS / "held_out") if args.held_out else (SETTINGS, CORPUS)
    into = args.into or into
    into.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs = prepare(Path(folder))
        for name in args.only.split(",") if args.only else settings:
            for seed in map(int, args.seeds.split(",")) if args.seeds else settings[name].seeds:
                print(record(name, settings[name], seed, inputs, into), flush=True)
