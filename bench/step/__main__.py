"""`make bench-step`: whole training steps, ours and other trainers', on the same work, one process after the other.

    python -m rlhf_fast.bench.step --model FOLDER [--data FILE] [--json bench/results/step.json] [--only KEY,KEY]

Each contestant runs in a process of its own, the peers in environments of their own (.venv-trl, .venv-agilerl, which
`make bench-step` installs). Prints a JSON line for each run and the tables at the end.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from rlhf_fast.bench.results import machine
from rlhf_fast.bench.step import arithmetic, tables
from rlhf_fast.bench.step.contest import ROWS, Row
from rlhf_fast.bench.step.process import Failed
from rlhf_fast.bench.step.runs import PYTHON, missing, run_row, versions
from rlhf_fast.bench.step.work import Work, prepare, quick, without_paths

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
    present = [row for row in rows if missing(row) is None]
    measured: dict[str, Any] = {
        "machine": machine() | {"load_before": os.getloadavg()[0]},
        "versions": {who: versions(PYTHON[who]) for who in dict.fromkeys(row.who for row in present)},
        "quick": args.quick,
        "work": without_paths(work),
        "peaks": arithmetic.peaks(args.quick),
        "runs": [],
        "failed": {},
        "missing": {row.key: reason for row in rows if (reason := missing(row))},
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
    lines, peak, seconds = run_row(row, str(number), work, work_file, folder)
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
        "process_seconds": seconds,
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contestant's process is stopped too
    main()
