"""`make bench-step`: whole training steps, ours and other trainers', on the same work, one process after the other.

    python -m rlhf_fast.bench.step --model FOLDER [--data FILE] [--json bench/results/step.json] [--only KEY,KEY]

Each contestant runs in a process of its own, the peers in environments of their own (.venv-trl, .venv-agilerl, which
`make bench-step` installs). Prints a JSON line for each run and the tables at the end.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import rlhf_fast
from rlhf_fast.bench.results import machine
from rlhf_fast.bench.step import arithmetic, tables
from rlhf_fast.bench.step.contest import ROWS, SEPARATE_REWARD, Row
from rlhf_fast.bench.step.process import Failed, run
from rlhf_fast.bench.step.work import Work, prepare, quick

ROOT = Path(rlhf_fast.__file__).parent.parent
SCRIPTS = Path(__file__).parent
PYTHON = {
    "rlhf-fast": Path(sys.executable),
    "peft": Path(sys.executable),
    "trl": ROOT / ".venv-trl" / "bin" / "python",
    "agilerl": ROOT / ".venv-agilerl" / "bin" / "python",
}
PACKAGES = ("torch", "transformers", "peft", "trl", "agilerl")
ROUNDS = 2
PHASES = {phase: f"perf/seconds_{phase}" for phase in ("rollout", "score", "update")}


def main() -> None:
    args = arguments()
    rows = chosen(args.only)
    if args.list:
        print("\n".join(f"{row.key:<24} {row.stage:<8} {row.dtype:<9} {row.name}" for row in rows))
        return
    work = quick(args.model) if args.quick else Work(args.model)
    with tempfile.TemporaryDirectory(prefix="rlhf-fast-step-") as folder:
        measured = measure(rows, work, args, Path(folder))
    print(f"\n{tables.tables(measured)}")
    if measured["failed"]:
        raise SystemExit(1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the base: a folder of a Llama-style model")
    parser.add_argument(
        "--data", type=Path, help="JSONL of HH-RLHF transcripts, also .gz; unset: the demo's preferences"
    )
    parser.add_argument("--json", type=Path, help="write every run here, after each of them")
    parser.add_argument("--only", help="rows to run, KEY,KEY")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each PPO row, in turn")
    parser.add_argument("--quick", action="store_true", help="one step of small sizes, for a tiny model")
    parser.add_argument("--list", action="store_true", help="only list the rows")
    return parser.parse_args()


def chosen(only: str | None) -> list[Row]:
    """The rows named; all when None. Raises SystemExit for a key that is no row's."""
    keys = [row.key for row in ROWS]
    wanted = keys if only is None else only.split(",")
    if unknown := [key for key in wanted if key not in keys]:
        raise SystemExit(f"--only: there is no row {unknown[0]!r}; there are {', '.join(keys)}")
    return [row for row in ROWS if row.key in wanted]


def measure(rows: list[Row], work: Work, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs. A row that fails is left out of later rounds, and its reason stands under "failed"; one whose
    environment is not there stands under "missing"."""
    start = perf_counter()
    work_file = prepare(work, args.data, folder)
    present = [row for row in rows if PYTHON[row.who].exists()]
    measured: dict[str, Any] = {
        "machine": machine() | {"load_before": os.getloadavg()[0]},
        "versions": {who: versions(PYTHON[who]) for who in dict.fromkeys(row.who for row in present)},
        "quick": args.quick,
        "work": asdict(work) | {"model": Path(work.model).name, "prompts": "", "sft": "", "reward": ""},
        "peaks": arithmetic.peaks(args.quick),
        "runs": [],
        "failed": {},
        "missing": {
            row.key: f"no {row.who} in {PYTHON[row.who].relative_to(ROOT)}" for row in rows if row not in present
        },
    }
    for number in range(args.rounds):
        for row in present:
            if row.key in measured["failed"] or number >= (row.rounds or args.rounds):
                continue
            try:
                measured["runs"].append(one_run(row, number + 1, work, work_file, folder))
                print(json.dumps(measured["runs"][-1]), flush=True)
            except Failed as error:
                measured["failed"][row.key] = str(error)
                print(json.dumps({"key": row.key, "failed": str(error)}), flush=True)
            # again after each run, and the best kept: other work on the machine may have slowed the earlier ones
            measured["peaks"] = {d: max(rate, measured["peaks"][d]) for d, rate in arithmetic.peaks(args.quick).items()}
            measured["seconds"] = round(perf_counter() - start)
            if args.json:
                args.json.write_text(json.dumps(measured, indent=1) + "\n")
    return measured


def one_run(row: Row, number: int, work: Work, work_file: Path, folder: Path) -> dict[str, Any]:
    """The run's record: seconds, phases and response tokens of every step, the first one included."""
    output = folder / f"{row.key}-{number}"
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
    peak = run(command, output.with_suffix(".log"), environment)
    wall = perf_counter() - start
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "perf/seconds_step" in line]
    phases = {phase: [line[name] for line in lines] for phase, name in PHASES.items() if name in lines[0]}
    lengths = [line["response/length_mean"] for line in lines if "response/length_mean" in line]
    return {
        **{name: getattr(row, name) for name in ("key", "name", "stage", "who", "dtype", "memory", "speed")},
        "flags": dict(row.flags),
        "round": number,
        "seconds": [line["perf/seconds_step"] for line in lines],
        "phases": phases,
        "response_tokens": [round(length * work.batch_size) for length in lengths],
        "peak_memory_gb": peak,
        "process_seconds": wall,
    }


# who -> script, and whether it wants the stage's name
PEERS = {"trl": ("trl_step.py", True), "agilerl": ("agilerl_ppo.py", False), "peft": ("peft_generate.py", False)}


def our_command(row: Row, work: Work, steps: int, output: Path) -> list[str]:
    flags = {
        "model_name_or_path": work.model,
        "dataset_name": {"ppo": work.prompts, "sft": work.sft, "reward": work.reward}[row.stage],
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
    """The reward: a model of its own, or an adapter on the base, which is made where it is first needed."""
    if row.name == SEPARATE_REWARD:
        return [f"--reward_functions={SCRIPTS / 'separate_reward.py'}:score"]
    layers = row.flags.get("lora_layers")
    output = folder / f"reward-adapter-{row.dtype}-{layers}"
    if not output.exists():
        making = Row("", "", "reward", "rlhf-fast", row.dtype, {"lora_layers": layers} if layers else {})
        run(our_command(making, work, 1, output), output.with_suffix(".log"), environment)
    return [f"--reward_adapter={output / 'adapter'}"]


def versions(python: Path) -> dict[str, str]:
    """The packages of an environment that take part."""
    code = (
        "import importlib.metadata as m, json; "
        f"names = {{d.metadata['Name'].lower() for d in m.distributions()}} & set({PACKAGES!r}); "
        "print(json.dumps({name: m.version(name) for name in sorted(names)}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contestant's process is stopped too
    main()
