"""Merges an adapter into its base: a plain transformers model that needs neither PEFT nor rlhf-fast."""

import json
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rlhf_fast.errors import UserError
from rlhf_fast.models import adapters, folder, identity, layers, pretrained, targets


def merge(adapter: str, output_dir: str, dtype: str | None = None) -> Path:
    """Writes base + adapter to ``output_dir`` as safetensors with the tokenizer.

    A policy becomes a causal language model, a reward model a sequence classifier with one label and its ``score``
    head (its calibration constants go into the config as ``score_mean`` and ``score_std``; the raw score is kept).
    ``dtype``: float32, bfloat16 or float16; None keeps the base's own.
    """
    lora, state = adapters.read_adapter(adapter)
    if dtype is not None and dtype not in pretrained.DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(pretrained.DTYPES)}; got {dtype!r}")
    target = Path(output_dir)
    if target.is_file():
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--output_dir {output_dir} is not empty; name a new folder")
    folder.check_files(adapter)
    with pretrained.located(lora.base_model_name_or_path or "") as source:
        try:
            tokenizer = pretrained.load_tokenizer(adapter)
        except (OSError, ValueError) as error:
            raise UserError(f"no tokenizer in {adapter}; copy the one it was trained with there") from error
        model = _load_base(source, lora, Path(adapter), tokenizer.pad_token_id, dtype)
    adapters.without_base_weights(adapter, state, model)
    _untie(model, state)
    with layers.quiet_peft():
        peft = PeftModel.from_pretrained(model, adapter)
        lost = sorted(state.keys() - get_peft_model_state_dict(peft).keys())
        if lost:
            raise UserError(f"{adapter}: a {type(model).__name__} has no place for {len(lost)} tensors, as {lost[0]}")
        merged = peft.merge_and_unload()
    try:
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the merged model to {output_dir}: {reason}") from error
    return target


def _untie(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Gives the head its own copy of the weight if it shares it with the token embedding and one of them has an
    adapter, which changes it alone."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    if any(f"{path}.lora_" in key for path in targets.outside(model) for key in state):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _load_base(source: str, lora: LoraConfig, adapter: Path, pad_id: int, dtype: str | None) -> PreTrainedModel:
    """The base with its pad token and, for a reward model, one label. Raises UserError if the adapter was made for
    another base, or if transformers has no classifier of this architecture."""
    folder.check_files(source)
    with pretrained.loading(source, source, "config.json"):
        config = AutoConfig.from_pretrained(source)
    folder.check_sizes(source, config)
    config.pad_token_id = config.get_text_config(decoder=True).pad_token_id = pad_id
    chosen = "auto" if dtype is None else pretrained.DTYPES[dtype]
    kind, fresh = pretrained.auto_class(config), tuple[str, ...]()
    if lora.task_type == "SEQ_CLS":
        kind, fresh = AutoModelForSequenceClassification, ("score.weight",)  # replaced by the adapter's head
        config.num_labels = 1
        constants = adapter / adapters.CALIBRATION
        if constants.is_file():
            values = json.loads(constants.read_text())
            config.score_mean, config.score_std = values["mean"], values["std"]
    with pretrained.loading(source, source, "the model that config.json describes"):
        try:
            model = pretrained.load_weights(kind, source, fresh=fresh, config=config, dtype=chosen)
        except ValueError as error:  # the auto class has no class for this config
            reason = f"transformers has no {kind.__name__} for a {config.model_type}, so it cannot merge"
            raise UserError(reason) from error
    decoder = layers.find_decoder(model)
    linear = targets.inside(decoder, targets.find_targets(decoder).linear)
    identity.check(str(adapter), adapter, lora.base_model_name_or_path, identity.fingerprint(linear), source)
    return model
