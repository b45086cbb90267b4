"""transformers' generate with a PEFT adapter: one line of metrics.jsonl for each batch of responses.

python peft_generate.py WORK.json OUTPUT --dtype bfloat16 --steps 3
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("work", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--dtype", required=True)
parser.add_argument("--steps", type=int, required=True)
args = parser.parse_args()
work = json.loads(args.work.read_text())

tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
tokenizer.pad_token = work["pad_token"]
lora = LoraConfig(r=work["lora_r"], lora_alpha=2 * work["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM")
base = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, args.dtype))
base.generation_config.eos_token_id = None
model = get_peft_model(base, lora).eval()
texts = [json.loads(line)["prompt"] for line in Path(work["prompts"]).read_text().splitlines()]
prompts = tokenizer(texts, padding=True, return_tensors="pt")
length = work["response_length"]
with (args.output / "metrics.jsonl").open("w") as lines:
    for _ in range(args.steps):
        start = time.perf_counter()
        with torch.no_grad():
            sequences = model.generate(**prompts, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=length)
        seconds = time.perf_counter() - start
        made = sequences.shape[1] - prompts["input_ids"].shape[1]
        lines.write(json.dumps({"perf/seconds_step": seconds, "response/length_mean": made}) + "\n")
