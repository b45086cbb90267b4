"""Random models of 4 layers and 32 hidden units, one an architecture, and shared bases made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf_fast.config import StageConfig
from rlhf_fast.models import SharedBase

MakeBase = Callable[..., SharedBase]

# final_logit_softcapping is low, so that a forgotten softcap shows; sliding_window is shorter than the test batches.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "gpt2": {},
    "gpt_neox": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 3.0},
}


def tiny_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """float32, frozen, in eval mode; the same weights every time. Attention dropout is on where it is ever used."""
    settings: dict[str, Any] = {
        "vocab_size": 288,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(architecture, **{**settings, **ARCHITECTURES.get(architecture, {}), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()


def save_model(folder: Path, tokenizer_folder: Path, architecture: str, **changes: Any) -> Path:
    """A model folder as save_pretrained writes it, tokenizer included."""
    tiny_model(architecture, **changes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def randomise(base: SharedBase, role: str, seed: int) -> None:
    """Gives the role's parameters values of their own: a fresh adapter changes nothing, and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in base.named_parameters(role).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def batch(lengths: list[int], side: str, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids and their mask; row i is the same whatever the other lengths, the side and the width."""
    width = width or max(lengths)
    input_ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width).long()
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        input_ids[row, place] = torch.randint(2, 258, (length,), generator=torch.Generator().manual_seed(row))
        mask[row, place] = 1
    return input_ids, mask


def settings(**changes: Any) -> StageConfig:
    return StageConfig(**{"lora_r": 4, "lora_alpha": 8.0, **changes})
