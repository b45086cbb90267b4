"""verl's loss functions with verl's signatures, computed by our operations. Tested against verl 0.9.1.

``patch()`` makes verl call them, ``unpatch()`` and the end of ``with patched():`` undo it, and ``report()`` says what
was replaced, what was not and why, and how often verl called it. A patch holds for one process: verl's workers are
processes of their own, and each has to call it before its engine starts.

verl's own doors take the functions too: ``register_policy_loss("fast")(compute_policy_loss_vanilla)``, with
``actor.policy_loss.loss_mode=fast``; ``register_adv_est`` in the same way for the advantages.

Where they differ from verl's on purpose: results are float32 for half-precision inputs too; advantages, returns and
whitened values are 0 at masked tokens; a batch without a token that counts gives 0 and not NaN; a mask with fractions
is an error on the CPU: multiply the loss by weights instead.

Where nothing else is said, tensors are (B, T), float, and a mask is bool or 0/1, 1 = counts. Errors are those of the
operations: TypeError for a dtype, ValueError for a shape, device or setting.
"""

import pkgutil
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import (
    aggregate,
    clipped_value_loss,
    gae,
    group_advantages,
    linear_logprobs,
    masked_logprobs,
    token_kl,
)
from rlhf_fast.ops import masked_whiten as ops_masked_whiten

from ._logits import entropy_from_logits
from ._patch import Patch, Replacement, Step
from ._verl_policy_losses import (
    LOG_RATIO_BOUND,
    aggregation_of,
    compute_policy_loss,
    compute_policy_loss_cispo,
    compute_policy_loss_clip_cov,
    compute_policy_loss_dppo_kl,
    compute_policy_loss_dppo_tv,
    compute_policy_loss_dro,
    compute_policy_loss_geo_mean,
    compute_policy_loss_gpg,
    compute_policy_loss_gspo,
    compute_policy_loss_kl_cov,
    compute_policy_loss_sapo,
    compute_policy_loss_vanilla,
)

__all__ = [
    "FusedLinearForPPO",
    "agg_loss",
    "calculate_sum_pi_squared_from_logits",
    "compute_gae_advantage_return",
    "compute_grpo_outcome_advantage",
    "compute_policy_loss",
    "compute_policy_loss_cispo",
    "compute_policy_loss_clip_cov",
    "compute_policy_loss_dppo_kl",
    "compute_policy_loss_dppo_tv",
    "compute_policy_loss_dro",
    "compute_policy_loss_geo_mean",
    "compute_policy_loss_gpg",
    "compute_policy_loss_gspo",
    "compute_policy_loss_kl_cov",
    "compute_policy_loss_sapo",
    "compute_policy_loss_vanilla",
    "compute_rloo_outcome_advantage",
    "compute_value_loss",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "kl_penalty",
    "linear_cross_entropy",
    "logprobs_from_logits",
    "masked_whiten",
    "patch",
    "patched",
    "report",
    "unpatch",
]

# ---- verl.utils.torch_functional and the fused heads ----------------------------------------------------------------


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs of ``labels`` (...) under ``logits`` (..., V); as in verl, the backward may overwrite the logits."""
    return masked_logprobs(logits, labels, inplace_backward=inplace_backward)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """``entropy_from_logits``, which needs no chunks."""
    return entropy_from_logits(logits)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """The sum of the squared probabilities of each row of ``logits`` (..., V); without gradient."""
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return masked_logprobs(logits.detach(), targets, return_statistics=True).log_sum_squares.exp()


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Mean 0 and variance 1 over the tokens that count; 0 at the others."""
    return ops_masked_whiten(values, mask, shift_mean=shift_mean)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) of ``labels`` (...) from ``hidden`` (..., H) and the head ``weight`` (V, H), flat as verl's.

    Raises ValueError for a reduction other than "none", and for a vocabulary that is split over ranks.
    """
    if reduction != "none" or dist_process_group is not None:
        raise ValueError(
            "linear_cross_entropy: expected reduction 'none' and no dist_process_group (a head on every rank); "
            f"got {reduction!r} and {dist_process_group!r}: use verl's own for these"
        )
    logprobs, entropy = linear_logprobs(
        hidden.flatten(0, -2), weight, labels.flatten(), temperature=temperature, return_entropy=True
    )
    return logprobs, entropy


class FusedLinearForPPO(torch.nn.Module):
    """Log-probs and entropy from hidden states and the lm head; the logits are never stored as a whole.

    Both arguments are verl's and have no effect.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (..., H), vocab_weights (V, H), input_ids (...) -> two of (...), float32."""
        logprobs, entropy = linear_logprobs(
            hidden_states, vocab_weights, input_ids, temperature=temperature, return_entropy=True
        )
        return logprobs, entropy


# ---- verl.trainer.ppo.core_algos: aggregation, KL, value loss -------------------------------------------------------


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """One number from a loss per token (B, T), with verl's modes, "token-sum" included.

    Raises ValueError for an unknown mode, and for dp_size > 1 without the number of the whole batch.
    """
    return aggregate(
        loss_mat,
        loss_mask,
        **aggregation_of(loss_mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor),
    )


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """The KL of each token: "kl" or "k1", "abs", "mse" or "k2", "low_var_kl" or "k3"; with "+", the slope of k2.

    As in verl, the log ratio in k3 is bounded by 20 and its value by 10; past a bound the slope is 0. Raises
    NotImplementedError, as verl does, for another name.
    """
    base = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(kl_penalty.rstrip("+"), kl_penalty.rstrip("+"))
    if base not in ("k1", "k2", "k3", "abs"):
        raise NotImplementedError(
            f"kl_penalty: expected kl, k1, abs, mse, k2, low_var_kl or k3, or one of these and +; got {kl_penalty!r}: "
            "for the KL over the whole vocabulary call rlhf_fast.exact_kl"
        )
    if base == "k3":
        log_ratio = (logprob - ref_logprob).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        value = token_kl(log_ratio, torch.zeros_like(log_ratio), estimator="k3").clamp(max=10)
    else:
        value = token_kl(logprob, ref_logprob, estimator=base)
    if not kl_penalty.endswith("+") or base == "k2":
        return value
    slope = token_kl(logprob, ref_logprob, estimator="k2")
    return slope - slope.detach() + value.detach()


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """-> the clipped value loss, and the share of tokens whose loss is clipped."""
    how = aggregation_of(response_mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    result = clipped_value_loss(vpreds, values, returns, response_mask, clip=cliprange_value, **how)
    return result.loss, result.clip_fraction


# ---- advantages -----------------------------------------------------------------------------------------------------


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """-> whitened advantages, and returns, (B, T), 0 at masked tokens. Masked tokens are skipped."""
    rewards = token_level_rewards if token_level_rewards.is_floating_point() else token_level_rewards.float()
    return gae(rewards, values, response_mask, gamma=float(gamma), lam=float(lam), whiten=True)


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable],
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """GRPO, or Dr. GRPO without the standard deviation; advantages and returns are the same, (B, T).

    A response without others of its prompt (``index``) keeps its reward as its advantage, as in verl.
    """
    estimator = "grpo" if norm_adv_by_std_in_grpo else "dr_grpo"
    alone = 1 / (1 + epsilon) if norm_adv_by_std_in_grpo else 1.0
    return _outcome(token_level_rewards, response_mask, index, estimator, epsilon, alone)


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable],
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """RLOO; advantages and returns are the same, (B, T). A response without others keeps its reward, as in verl."""
    return _outcome(token_level_rewards, response_mask, index, "rloo", epsilon, 1.0)


def _outcome(
    rewards: Tensor, mask: Tensor, index: Sequence[Hashable], estimator: str, epsilon: float, alone: float
) -> tuple[Tensor, Tensor]:
    """``alone`` is the factor of the reward of a response that is alone in its group."""
    scores = rewards.sum(-1)
    numbers: dict[Hashable, int] = {}
    groups = [numbers.setdefault(name, len(numbers)) for name in index]
    sizes = Counter(groups)
    single = torch.tensor([sizes[group] == 1 for group in groups], device=scores.device, dtype=torch.bool)
    ids = torch.tensor(groups, device=scores.device, dtype=torch.int64)
    advantages = group_advantages(scores, ids, estimator=estimator, epsilon=epsilon)
    advantages = torch.where(single, alone * scores, advantages)
    advantages = advantages.unsqueeze(-1) * mask
    return advantages, advantages


# ---- the patch ------------------------------------------------------------------------------------------------------

_CORE, _FUNCTIONAL = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
_POLICY_LOSSES: dict[str, Callable[..., Any]] = {
    "vanilla": compute_policy_loss_vanilla,
    "gspo": compute_policy_loss_gspo,
    "cispo": compute_policy_loss_cispo,
    "sapo": compute_policy_loss_sapo,
    "dppo_tv": compute_policy_loss_dppo_tv,
    "dppo_kl": compute_policy_loss_dppo_kl,
    "gpg": compute_policy_loss_gpg,
    "clip_cov": compute_policy_loss_clip_cov,
    "kl_cov": compute_policy_loss_kl_cov,
    "geo_mean": compute_policy_loss_geo_mean,
    "dro": compute_policy_loss_dro,
}
_ESTIMATORS: dict[str, Callable[..., Any]] = {
    "gae": compute_gae_advantage_return,
    "grpo": compute_grpo_outcome_advantage,
    "rloo": compute_rloo_outcome_advantage,
}


def get_policy_loss_fn(name: str) -> Callable[..., Any]:
    """The policy loss that verl has under this name; ours in place of verl's own, not of one that a user registered."""
    return _ours_or(_POLICY_LOSSES, name, "POLICY_LOSS_REGISTRY")


def get_adv_estimator_fn(name_or_enum: Any) -> Callable[..., Any]:
    """The same for an estimator of advantages."""
    return _ours_or(_ESTIMATORS, getattr(name_or_enum, "value", name_or_enum), "ADV_ESTIMATOR_REGISTRY")


def _ours_or(ours: dict[str, Callable[..., Any]], name: str, registry: str) -> Callable[..., Any]:
    registered: dict[str, Callable[..., Any]] = pkgutil.resolve_name(f"{_CORE}.{registry}")
    if name not in registered:
        raise ValueError(f"verl: expected one of {', '.join(registered)}; got {name!r}")
    function = registered[name]
    return ours[name] if name in ours and function.__module__ == _CORE else function


_patch = Patch(
    "verl",
    versions=("0.9", "0.9"),
    replacements=[
        *(
            Replacement(f"{_FUNCTIONAL}.{function.__name__}", function)
            for function in (
                logprobs_from_logits,
                entropy_from_logits,
                entropy_from_logits_with_chunking,
                calculate_sum_pi_squared_from_logits,
            )
        ),
        Replacement("verl.utils.experimental.torch_functional.FusedLinearForPPO", FusedLinearForPPO),
        *(
            Replacement(f"{_CORE}.{function.__name__}", function)
            for function in (
                agg_loss,
                kl_penalty,
                compute_policy_loss,
                compute_value_loss,
                compute_gae_advantage_return,
                compute_grpo_outcome_advantage,
                get_policy_loss_fn,
                get_adv_estimator_fn,
            )
        ),
    ],  # fmt: skip
    left={
        "the policy loss bypass_mode": "it calls one of verl's own, on weights that it computes itself",
        "linear_cross_entropy": "verl's also splits the vocabulary over ranks; for a whole head call ours",
        "masked_whiten": "other code may read the values that it leaves at masked tokens",
    },
    step=Step("verl.workers.utils.losses.ppo_loss", get_policy_loss_fn, lambda config: True),
)
patch, unpatch, patched, report = _patch.patch, _patch.unpatch, _patch.patched, _patch.report
