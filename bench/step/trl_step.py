"""TRL's trainers, in an environment of their own (`pip install trl==1.12.0 peft datasets`): 1.12 is the last with PPO.

    python trl_step.py ppo|sft|reward WORK.json OUTPUT --dtype bfloat16 --steps 3 [--own_reference]

Writes one line of OUTPUT/metrics.jsonl a step. WORK.json is what bench/step/work.py writes. --own_reference: the
reference is a model of its own; unset, it is the policy with its adapter switched off.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """A line for each step."""

    def __init__(self, path: Path, figures: dict[str, Any]) -> None:
        self.lines, self.figures = path.open("w"), figures

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.lines.write(json.dumps({"perf/seconds_step": now - self.began, **self.figures}) + "\n")
        self.lines.flush()
        self.began = now


parser = argparse.ArgumentParser()
parser.add_argument("stage", choices=["ppo", "sft", "reward"])
parser.add_argument("work", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--dtype", required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--own_reference", action="store_true")
args = parser.parse_args()
work = json.loads(args.work.read_text())
tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left" if args.stage == "ppo" else "right")
tokenizer.pad_token = work["pad_token"]
options: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}


def language_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(work["model"], **options)


def scalar_model() -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


lora = LoraConfig(
    r=work["lora_r"],
    lora_alpha=2 * work["lora_r"],
    target_modules="all-linear",
    task_type="SEQ_CLS" if args.stage == "reward" else "CAUSAL_LM",
)
micro_batch = work["batch_size"] // 4 if args.stage == "ppo" else work["train_micro_batch"]
settings: dict[str, Any] = {
    "output_dir": str(args.output / "trainer"),
    "per_device_train_batch_size": micro_batch,
    "gradient_accumulation_steps": work["batch_size"] // micro_batch,
    "learning_rate": work["learning_rate"],
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": not torch.cuda.is_available(),
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "no",
}
common: dict[str, Any] = {"processing_class": tokenizer, "peft_config": lora}
if args.stage == "ppo":
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    texts = [json.loads(line)["prompt"] for line in Path(work["prompts"]).read_text().splitlines()]
    prompts = Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})
    trainer = PPOTrainer(
        args=PPOConfig(
            **settings,
            num_mini_batches=1,
            num_ppo_epochs=work["ppo_epochs"],
            total_episodes=work["batch_size"] * args.steps,
            response_length=work["response_length"],
            local_rollout_forward_batch_size=work["batch_size"],
            num_sample_generations=0,
            stop_token=None,
        ),
        model=language_model(),
        ref_model=language_model() if args.own_reference else None,
        reward_model=scalar_model(),
        value_model=scalar_model(),
        train_dataset=prompts,
        eval_dataset=prompts,
        callbacks=[Clock(args.output / "metrics.jsonl", {"response/length_mean": work["response_length"]})],
        **common,
    )
else:
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    settings |= {"max_length": work["max_length"], "max_steps": args.steps}
    rows = load_dataset("json", data_files=work[args.stage], split="train")
    common |= {"train_dataset": rows, "callbacks": [Clock(args.output / "metrics.jsonl", {})]}
    if args.stage == "sft":
        trainer = SFTTrainer(model=language_model(), args=SFTConfig(**settings), **common)
    else:
        trainer = RewardTrainer(model=scalar_model(), args=RewardConfig(**settings), **common)
trainer.train()
