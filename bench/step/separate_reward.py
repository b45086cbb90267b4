"""A reward model that is a model of its own, as a reward function: what sharing the base saves, left out.

`--reward_functions bench/step/separate_reward.py:score`. RLHF_FAST_STEP_WORK names WORK.json, RLHF_FAST_STEP_DTYPE the
dtype.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@functools.cache
def loaded() -> tuple[Any, Any]:
    work = json.loads(Path(os.environ["RLHF_FAST_STEP_WORK"]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="right")
    tokenizer.pad_token = work["pad_token"]
    dtype = getattr(torch, os.environ["RLHF_FAST_STEP_DTYPE"])
    model = AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, dtype=dtype).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


@torch.no_grad()
def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    tokenizer, model = loaded()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.float().flatten().tolist()
