"""One training step of TRL's trainers as it is, with rlhf_fast.integrations.trl, and with fused LoRA layers too; and
one of `rlhf-fast dpo` beside TRL's DPO.

    python -m rlhf_fast.bench.trl_patch --model FOLDER --json FILE

Each in a process of its own, one after the other. Needs TRL and PEFT: `make bench-trl` has an environment with both.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.bench.results import machine
from rlhf_fast.bench.step.contest import BF16, Row
from rlhf_fast.bench.step.process import run
from rlhf_fast.bench.step.runs import ROOT, our_command
from rlhf_fast.bench.step.tables import of_trainers
from rlhf_fast.bench.step.work import Work, prepare

ROWS = {"SFT": "sft", "DPO": "reward", "KTO": "reward", "GRPO": "prompts", "RLOO": "prompts"}
SAMPLING = ("GRPO", "RLOO")
FORMS = ("TRL", "patched", "patched and fused")
OURS = "rlhf-fast dpo"
WARM_UP = 4  # steps; GRPO and RLOO sample at every fourth


def letters(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def train(trainer_name: str, form: str, work: dict[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """-> the seconds of a step, mean and median, and the loss of the last one."""
    import trl
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from rlhf_fast.integrations import peft as peft_integration
    from rlhf_fast.integrations import trl as trl_integration

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    if form != "TRL":
        trl_integration.patch(strict=True)
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    tokenizer.pad_token = work["pad_token"]
    options: dict[str, Any] = {"max_length": work["max_length"]}
    if trainer_name in SAMPLING:
        options = {"num_generations": 4, "num_iterations": 4, "max_completion_length": work["response_length"]}
        options["beta"] = 0.04
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.bfloat16),
        args=getattr(trl, f"{trainer_name}Config")(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=work["batch_size"],
            max_steps=WARM_UP + steps,
            learning_rate=work["learning_rate"],
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            **options,
        ),
        train_dataset=load_dataset("json", data_files=work[ROWS[trainer_name]], split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=work["lora_r"], lora_alpha=2 * work["lora_r"], target_modules="all-linear"),
        callbacks=[Clock()],
        **({"reward_funcs": letters} if trainer_name in SAMPLING else {}),
    )
    if form == "patched and fused":
        peft_integration.fuse(trainer.model, dict(tokenizer("a few tokens", return_tensors="pt")))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return timed(Clock.seconds[WARM_UP:]) | {"loss": losses[-1]}


def timed(seconds: list[float]) -> dict[str, Any]:
    return {"seconds": statistics.mean(seconds), "median": statistics.median(seconds)}


def train_ours(work: Work, path: Path, steps: int) -> tuple[dict[str, Any], float]:
    """`rlhf-fast dpo` on the work of TRL's DPO, in the project's own environment: as ``train``, and the peak in GB."""
    row = Row("dpo", OURS, "dpo", "rlhf-fast", BF16)
    output = path.parent / "ours"
    _, *command = our_command(row, work, WARM_UP + steps, output)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    peak = run([str(ROOT / ".venv" / "bin" / "python"), *command], path.parent / "log.txt", environment, limit=1800)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["perf/seconds_step"] for line in lines if "perf/seconds_step" in line]
    return timed(seconds[WARM_UP:]) | {"loss": lines[-1]["loss"]}, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="timed steps; a multiple of 4, after 4 that are not timed")
    parser.add_argument("--only", help="trainers, A,B")
    parser.add_argument("--one", nargs=3, metavar=("TRAINER", "FORM", "WORK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        trainer, form, work_file = args.one
        work = json.loads(Path(work_file).read_text())
        args.json.write_text(json.dumps(train(trainer, form, work, args.steps, Path(work_file).parent)))
        return
    work = Work(args.model, batch_size=args.batch_size)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, one = prepare(work, None, folder), folder / "one.json"
        for trainer in args.only.split(",") if args.only else ROWS:
            for form in FORMS:
                command = [sys.executable, "-m", "rlhf_fast.bench.trl_patch", "--model", args.model]
                command += ["--json", str(one), "--steps", str(args.steps), "--one", trainer, form, str(path)]
                peak = run(command, folder / "log.txt", os.environ, limit=1800)
                results.append({"trainer": trainer, "form": form, "peak_gb": peak, **json.loads(one.read_text())})
                print(f"{trainer}, {form}: {results[-1]['seconds']:.2f} s a step, {peak:.2f} GB", flush=True)
            if trainer == "DPO":
                found, peak = train_ours(work, path, args.steps)
                results.append({"trainer": trainer, "form": OURS, "peak_gb": peak, **found})
                print(f"{trainer}, {OURS}: {found['seconds']:.2f} s a step, {peak:.2f} GB", flush=True)
    versions = {name: version(name) for name in ("trl", "peft", "transformers", "torch")}
    settings = {
        "batch_size": args.batch_size,
        "steps": args.steps,
        "max_length": work.max_length,
        "lora_r": work.lora_r,
    }
    settings |= {"model": Path(args.model).name, "response_length": work.response_length, "dtype": "bfloat16"}
    measured = {"machine": machine(), "settings": settings, "versions": versions, "results": results}
    args.json.write_text(json.dumps(measured, indent=1) + "\n")
    print(of_trainers(measured))


if __name__ == "__main__":
    main()
