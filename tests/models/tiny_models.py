"""Random models of 4 layers and 32 hidden units, one per architecture, and shared bases made from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf_fast.config import StageConfig
from rlhf_fast.models import SharedBase

MakeBase = Callable[..., SharedBase]

# final_logit_softcapping is low, so that a missing softcap is noticed; sliding_window is shorter than the test batches.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "gpt2": {},
    "gpt_neox": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 3.0},
}

GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
WINDOW: dict[str, Any] = {**GROUPED, "sliding_window": 5}
MIXTURE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
STATE_SPACE: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# Every architecture that test_architectures.py tests; docs/models.md lists the same ones.
TABLE: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "gemma": GROUPED,
    "gemma3_text": WINDOW,
    "phi": {},
    "phi3": WINDOW,
    "granite": {**GROUPED, "logits_scaling": 8.0},
    "cohere": {**GROUPED, "logit_scale": 0.25},
    "cohere2": {**WINDOW, "logit_scale": 0.25},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": WINDOW,
    "stablelm": GROUPED,
    "falcon": {"alibi": False},
    "bloom": {},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 5},
    "codegen": {"rotary_dim": 4},
    "gpt_bigcode": {},
    "mpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "xglm": {"ffn_dim": 48, "num_layers": 4, "d_model": 32, "attention_heads": 4},
    "starcoder2": WINDOW,
    "glm": GROUPED,
    "glm4": GROUPED,
    "smollm3": GROUPED,
    "nemotron": GROUPED,
    "ernie4_5": GROUPED,
    "exaone4": WINDOW,
    "seed_oss": GROUPED,
    "apertus": GROUPED,
    "nanochat": {**GROUPED, "final_logit_softcapping": 3.0},
    "mixtral": {**GROUPED, **MIXTURE},
    "qwen2_moe": {**GROUPED, **MIXTURE},
    "qwen3_moe": {**GROUPED, **MIXTURE},
    "olmoe": {**GROUPED, **MIXTURE},
    "gpt_oss": {**WINDOW, **MIXTURE},
    "granitemoe": {**GROUPED, **MIXTURE, "logits_scaling": 8.0},
    "deepseek_v2": {**MIXTURE, **LATENT},
    "deepseek_v3": {**MIXTURE, **LATENT},
    "glm4_moe": {**GROUPED, **MIXTURE, "n_group": 1, "topk_group": 1},
    "llama4_text": {**GROUPED, **MIXTURE, "intermediate_size_mlp": 48},
    "phimoe": {**GROUPED, **MIXTURE},
    "qwen3_next": {**GROUPED, **MIXTURE, **DELTA},
    "qwen3_5_text": {**GROUPED, **DELTA},
    "lfm2": GROUPED,
    "jamba": {**MIXTURE, "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {**STATE_SPACE, "num_key_value_heads": 2, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        **MIXTURE,
        **STATE_SPACE,
        "num_key_value_heads": 2,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "gemma4_text": {
        **WINDOW,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 16,  # whole vectors: torch's gelu rounds what is left over in another way
        "vocab_size_per_layer_input": 288,
    },
}


def tiny_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """float32, frozen, in eval mode; the same weights every time. Attention dropout is set if the model has it."""
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
    config = AutoConfig.for_model(architecture, **{**settings, **TABLE.get(architecture, {}), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()


def save_model(folder: Path, tokenizer_folder: Path, architecture: str, **changes: Any) -> Path:
    """A model folder as save_pretrained writes it, tokenizer included."""
    tiny_model(architecture, **changes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def randomise(base: SharedBase, role: str, seed: int) -> None:
    """Gives the role random parameters: a fresh adapter changes nothing and would hide mistakes."""
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
    return StageConfig(**{"dtype": "float32", "lora_r": 4, "lora_alpha": 8.0, **changes})
