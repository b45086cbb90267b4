"""An adapter folded into its base: a plain transformers model that needs neither PEFT nor rlhf-fast."""

import json
from pathlib import Path

import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast.errors import UserError
from rlhf_fast.models import adapters, layers, pretrained


def merge(adapter: str, output_dir: str, dtype: str | None = None) -> Path:
    """Writes base + adapter to ``output_dir`` as safetensors with the tokenizer.

    A policy becomes a causal language model, a reward model a sequence classifier with one label and its ``score``
    head (its calibration constants go into the config as ``score_mean`` and ``score_std``; the raw score is kept).
    ``dtype``: float32, bfloat16 or float16; None keeps the base's own.
    """
    lora, _ = adapters.read_adapter(adapter)
    if dtype is not None and dtype not in pretrained.DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(pretrained.DTYPES)}; got {dtype!r}")
    target = Path(output_dir)
    if target.is_file():
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--output_dir {output_dir} is not empty; name a new folder")
    source = pretrained.resolve(lora.base_model_name_or_path or "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {adapter}; copy the one it was trained with there") from error
    chosen = "auto" if dtype is None else pretrained.DTYPES[dtype]
    config = AutoConfig.from_pretrained(source)
    config.pad_token_id = tokenizer.pad_token_id
    transformers.utils.logging.disable_progress_bar()
    if lora.task_type == "SEQ_CLS":
        config.num_labels = 1
        constants = Path(adapter) / adapters.CALIBRATION
        if constants.is_file():
            values = json.loads(constants.read_text())
            config.score_mean, config.score_std = values["mean"], values["std"]
        # the base has no score head: transformers warns of a fresh one, which the adapter's replaces below
        verbosity = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()
        model = AutoModelForSequenceClassification.from_pretrained(source, config=config, dtype=chosen)
        transformers.utils.logging.set_verbosity(verbosity)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=chosen)
    with layers.quiet_peft():
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    try:
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the merged model to {output_dir}: {reason}") from error
    return target
