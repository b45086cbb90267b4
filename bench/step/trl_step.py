"""TRL's trainers, in an environment of their own (`pip install trl==1.12.0 peft datasets`): 1.12 is the last with PPO.

    python trl_step.py ppo|sft|reward WORK.json OUTPUT --dtype bfloat16 --steps 3 [--own_reference] [--learning FILE]

Writes one line of OUTPUT/metrics.jsonl a step. WORK.json is what bench/step/work.py writes. --own_reference: the
reference is a model of its own; unset, it is the policy with its adapter switched off. --learning: what
bench/step/learning.py writes: a seed, a Python reward and settings; critic and log-probs are then as rlhf-fast has
them.
"""

import argparse
import json
import runpy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)


class Clock(TrainerCallback):
    """A line for each step: its seconds, ``figures``, and what the trainer logs of it."""

    def __init__(self, path: Path, figures: dict[str, Any]) -> None:
        self.lines, self.figures = path.open("w"), figures
        self.logs: dict[str, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.logs = logs

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.lines.write(json.dumps({"perf/seconds_step": now - self.began, **self.figures, **self.logs}) + "\n")
        self.lines.flush()
        self.began = now


class PythonReward(torch.nn.Module):
    """A Python function of the responses where TRL wants a reward model: the "backbone" hands the tokens on, and the
    score of a response stands at each of its tokens."""

    base_model_prefix = "backbone"

    def __init__(self, function: Any, tokenizer: Any, length: int, figures: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.tokenizer, self.length, self.figures = function, tokenizer, length, figures

    def backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        # TRL ends a response at a padding token
        self.figures["response/length_mean"] = attention_mask[:, -self.length :].sum(dim=1).float().mean().item()
        return SimpleNamespace(hidden_states=[input_ids])

    def score(self, input_ids: torch.Tensor) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, -self.length :])
        scores = torch.tensor(self.function(completions=[text.strip() for text in texts]))
        return scores[:, None, None].expand(*input_ids.shape, 1)


parser = argparse.ArgumentParser()
parser.add_argument("stage", choices=["ppo", "sft", "reward"])
parser.add_argument("work", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--dtype", required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--micro_batch_size", type=int)
parser.add_argument("--own_reference", action="store_true")
parser.add_argument("--learning", type=Path)
args = parser.parse_args()
work = json.loads(args.work.read_text())
tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left" if args.stage == "ppo" else "right")
tokenizer.pad_token = work["pad_token"]
options: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}


def language_model() -> Any:
    model = AutoModelForCausalLM.from_pretrained(work["model"], **options)
    if args.learning:
        model.lm_head.register_forward_hook(lambda _module, _given, logits: logits.float())
    return model


def scalar_model() -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def lora(task: str) -> LoraConfig:
    return LoraConfig(r=work["lora_r"], lora_alpha=2 * work["lora_r"], target_modules="all-linear", task_type=task)


def adapted_critic() -> Any:
    """A LoRA adapter and a head, both in float32, and the head drawn as ours is: TRL puts the adapter on the policy
    alone."""
    model = scalar_model()
    torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    model.score.float().register_forward_pre_hook(lambda _module, given: (given[0].float(),))
    return get_peft_model(model, lora("SEQ_CLS")).base_model.model


micro_batch = args.micro_batch_size or work["train_micro_batch"]
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
common: dict[str, Any] = {
    "processing_class": tokenizer,
    "peft_config": lora("SEQ_CLS" if args.stage == "reward" else "CAUSAL_LM"),
}
if args.stage == "ppo":
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    figures = {"response/length_mean": work["response_length"]}
    if args.learning:
        learning = json.loads(args.learning.read_text())
        settings |= learning["settings"]
        set_seed(settings["seed"])
        function = runpy.run_path(learning["reward"])["score"]
        reward_model = PythonReward(function, tokenizer, work["response_length"], figures)
        value_model = adapted_critic()
    else:
        reward_model, value_model = scalar_model(), scalar_model()
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
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=prompts,
        eval_dataset=prompts,
        callbacks=[Clock(args.output / "metrics.jsonl", figures)],
        **common,
    )
    # All prompts are one batch, the loader's last, in which accelerate would step the optimizer after each micro-batch.
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
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
