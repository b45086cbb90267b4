"""An adapter folded into its base: a plain transformers model that needs neither PEFT nor rlhf-fast."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast.errors import UserError
from rlhf_fast.models import adapters, pretrained


def merge(adapter: str, output_dir: str, dtype: str | None = None) -> Path:
    """Writes base + adapter to ``output_dir`` as safetensors with the tokenizer.

    A policy becomes a causal language model, a reward model a sequence classifier with one label and its ``score``
    head (its calibration constants go into the config as ``score_mean`` and ``score_std``; the raw score is kept).
    ``dtype``: float32, bfloat16 or float16; None keeps the base's own.
    """
    lora, _ = adapters.read_adapter(adapter)
    target = Path(output_dir)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--output_dir {output_dir} is not empty; name a new folder")
    source = pretrained.resolve(lora.base_model_name_or_path or "")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    chosen = "auto" if dtype is None else pretrained.choose_dtype(dtype, torch.device("cpu"))
    config = AutoConfig.from_pretrained(source)
    config.pad_token_id = tokenizer.pad_token_id
    if lora.task_type == "SEQ_CLS":
        config.num_labels = 1
        constants = Path(adapter) / adapters.CALIBRATION
        if constants.is_file():
            values = json.loads(constants.read_text())
            config.score_mean, config.score_std = values["mean"], values["std"]
        model = AutoModelForSequenceClassification.from_pretrained(source, config=config, dtype=chosen)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=chosen)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    try:
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except OSError as error:
        raise UserError(f"cannot write the merged model to {output_dir}: {error.strerror or error}") from error
    return target
