"""The losses and their building blocks: functions from tensors to tensors, one per file."""

from ._dispatch import backends, use_backend
from ._native import build_info
from ._packed import PackedWeight as PackedWeight  # this and short_attention are for rlhf_fast.models: not public
from ._short_attention import can_attend as can_attend
from ._short_attention import short_attention as short_attention
from .aggregate import aggregate
from .clipped_policy_loss import ClipFractions, PolicyLoss, clip_fractions, clipped_policy_loss
from .clipped_value_loss import ValueLoss, clipped_value_loss
from .dft_loss import dft_loss
from .dpo_loss import DPOLoss, dpo_loss
from .exact_kl import exact_kl
from .gae import gae
from .gated_activation import gated_activation
from .group_advantages import group_advantages
from .group_whiten import group_whiten
from .importance_weighted_kl import importance_weighted_kl
from .kto_loss import KTOLoss, kto_loss
from .linear_cross_entropy import linear_cross_entropy
from .linear_logprobs import linear_logprobs
from .linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from .linear_policy_ref import PolicyRef, linear_policy_ref
from .lora_linear import lora_linear
from .masked_logprobs import TokenStatistics, masked_logprobs
from .masked_whiten import masked_whiten
from .orpo_loss import orpo_loss
from .pairwise_loss import pairwise_loss
from .policy_selections import clip_cov_loss, dppo_loss, kl_cov_loss
from .policy_variants import cispo_loss, gmpo_loss, gpg_loss, gspo_loss, sapo_loss, vespo_loss
from .ppo_loss import PPOLoss, ppo_loss
from .rms_norm import rms_norm
from .rotary_embedding import rotary_embedding
from .token_kl import token_kl
from .truncated_importance_weights import truncated_importance_weights

__all__ = [
    "ClipFractions",
    "DPOLoss",
    "KTOLoss",
    "LinearPolicyLoss",
    "PPOLoss",
    "PolicyLoss",
    "PolicyRef",
    "TokenStatistics",
    "ValueLoss",
    "aggregate",
    "backends",
    "build_info",
    "cispo_loss",
    "clip_cov_loss",
    "clip_fractions",
    "clipped_policy_loss",
    "clipped_value_loss",
    "dft_loss",
    "dpo_loss",
    "dppo_loss",
    "exact_kl",
    "gae",
    "gated_activation",
    "gmpo_loss",
    "gpg_loss",
    "group_advantages",
    "group_whiten",
    "gspo_loss",
    "importance_weighted_kl",
    "kl_cov_loss",
    "kto_loss",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_policy_ref",
    "lora_linear",
    "masked_logprobs",
    "masked_whiten",
    "orpo_loss",
    "pairwise_loss",
    "ppo_loss",
    "rms_norm",
    "rotary_embedding",
    "sapo_loss",
    "token_kl",
    "truncated_importance_weights",
    "use_backend",
    "vespo_loss",
]
