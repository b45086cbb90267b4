"""AgileRL's PPO for language models, in an environment of its own (`pip install agilerl[cpu-llm]==2.58.0`).

    python agilerl_ppo.py WORK.json OUTPUT --dtype bfloat16 --steps 2 [--least_memory]

Writes one line of OUTPUT/metrics.jsonl a step. WORK.json is what bench/step/work.py writes.
Policy, reference and critic are LoRA adapters on one base. AgileRL takes rewards from an environment, so the reward
model is a model of its own here. Without vLLM it samples one prompt at a time.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("work", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--dtype", required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--least_memory", action="store_true")
args = parser.parse_args()
work = json.loads(args.work.read_text())
batch, response_length = work["batch_size"], work["response_length"]

# Liger's kernels need a GPU, and AgileRL uses them wherever the package is installed.
for module in ("agilerl", "agilerl.algorithms.core.base", "agilerl.algorithms.ppo_llm"):
    vars(importlib.import_module(module))["HAS_LIGER_KERNEL"] = False
from agilerl.algorithms.ppo_llm import PPO  # noqa: E402

tokenizer = AutoTokenizer.from_pretrained(work["model"])
pad_token = work["pad_token"]
dtype = getattr(torch, args.dtype)

reward_model = AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, dtype=dtype)
reward_model.config.pad_token_id = tokenizer.convert_tokens_to_ids(pad_token)
agent = PPO(
    pad_token_id=reward_model.config.pad_token_id,
    pad_token=pad_token,
    model_name=work["model"],
    model_config={"torch_dtype": dtype},
    lora_config=LoraConfig(r=work["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM"),
    batch_size=batch,
    micro_batch_size_per_gpu=1 if args.least_memory else batch,
    mini_batch_size=batch,
    update_epochs=work["ppo_epochs"],
    lr_actor=work["learning_rate"],
    lr_critic=work["learning_rate"],
    top_k=0,
    max_output_tokens=response_length,
    min_output_tokens=response_length,
    max_model_len=work["prompt_tokens"][1] + response_length,
    hf_generate_chunk_size=batch,
    use_liger_loss=False,
    gradient_checkpointing=args.least_memory,
    fuse_actor_critic_pass=not args.least_memory,
    device="cpu",
)
prompts = [json.loads(line)["prompt"] for line in Path(work["prompts"]).read_text().splitlines()]
observations = [dict(tokenizer(prompt, return_tensors="pt")) for prompt in prompts]
with (args.output / "metrics.jsonl").open("w") as lines:
    for _ in range(args.steps):
        clock = [time.perf_counter()]
        token_ids, masks = agent.get_action(observations)[:2]
        clock.append(time.perf_counter())
        with torch.no_grad():
            width = max(ids.shape[1] for ids in token_ids)
            pad = reward_model.config.pad_token_id
            padded = torch.cat(
                [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=pad) for ids in token_ids]
            )
            rewards = reward_model(padded, attention_mask=(padded != pad).long()).logits.float().flatten()
        agent.learn((token_ids, masks, rewards))
        clock.append(time.perf_counter())
        length = sum(int(mask.sum()) for mask in masks) / batch
        lines.write(
            json.dumps(
                {
                    "perf/seconds_step": clock[2] - clock[0],
                    "perf/seconds_rollout": clock[1] - clock[0],
                    "response/length_mean": length,
                }
            )
            + "\n"
        )
