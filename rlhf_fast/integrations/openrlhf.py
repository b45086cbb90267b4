"""OpenRLHF's losses and log-probs with OpenRLHF's signatures, computed by our operations. Tested against 0.11.2.

``patch()`` makes OpenRLHF call them, ``unpatch()`` and the end of ``with patched():`` undo it, and ``report()`` says
what was replaced, what was not and why, and how often OpenRLHF called it (for a class: made one). A patch holds for one
process: each of OpenRLHF's Ray actors has to call it.

Where they differ from OpenRLHF's on purpose: results are float32 for half-precision inputs too; a masked token is never
read, so that its NaN has no effect; a batch without a token that counts gives 0 and not NaN; the log ratio of a
sequence is bounded to +-20, as that of a token; ``log_probs_from_logits`` leaves the logits as they are.

Where nothing else is said, tensors are (B, T), float, and a mask is bool or 0/1, 1 = counts. Errors are those of the
operations: TypeError for a dtype, ValueError for a shape, device or setting.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.ops import (
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
    dpo_loss,
    gae,
    gspo_loss,
    masked_logprobs,
    pairwise_loss,
    token_kl,
    truncated_importance_weights,
)

from ._logits import entropy_from_logits
from ._patch import Patch, Replacement, Step

__all__ = [
    "DPOLoss",
    "LogExpLoss",
    "PairWiseLoss",
    "PolicyLoss",
    "SFTLoss",
    "ValueLoss",
    "aggregate_loss",
    "compute_approx_kl",
    "compute_entropy",
    "get_advantages_and_returns",
    "get_cumulative_returns",
    "log_probs_from_logits",
    "patch",
    "patched",
    "report",
    "unpatch",
]

KL_BOUND = 10.0  # of an estimate, and of the importance weight of its gradient


# ---- openrlhf.models.utils ------------------------------------------------------------------------------------------


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of ``labels`` (...) under ``logits`` (..., V)."""
    return masked_logprobs(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """The entropy in nats of each row of ``logits`` (..., V)."""
    return entropy_from_logits(logits)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """The estimate k1, k2 or k3 of the KL of each token, bounded to +-10; past a bound the slope is 0.

    With ``unbiased_gradient`` it has the slope of k2, times the ratio to ``log_probs_old``, which is at most 10.
    """
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"compute_approx_kl: kl_estimator must be k1, k2 or k3; got {kl_estimator!r}")
    if kl_estimator == "k3":
        log_ratio = (log_probs.float() - log_probs_base.float()).clamp(min=-KL_BOUND)
        value = token_kl(log_ratio, torch.zeros_like(log_ratio), estimator="k3")
    else:
        value = token_kl(log_probs, log_probs_base, estimator=kl_estimator)
    value = value.clamp(-KL_BOUND, KL_BOUND)
    if not unbiased_gradient:
        return value
    slope = token_kl(log_probs, log_probs_base, estimator="k2")
    if log_probs_old is not None:
        slope = slope * (log_probs.float() - log_probs_old.float()).exp().clamp(max=KL_BOUND).detach()
    return value.detach() + slope - slope.detach()


# ---- openrlhf.models.loss -------------------------------------------------------------------------------------------


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor:
    """The mean over tokens, or over sequences of their token means; of the whole batch where its number is given."""
    how = _aggregation(token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    return aggregate(loss, loss_mask, **how)


def _aggregation(
    token_level_loss: bool,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> dict[str, Any]:
    items = batch_num_tokens if token_level_loss else global_batch_size
    return {
        "aggregation": "token-mean" if token_level_loss else "seq-mean-token-mean",
        "num_items": None if items is None else items / dp_size,
    }


class SFTLoss(nn.Module):
    def __init__(self, token_level_loss: bool = True) -> None:
        super().__init__()
        self.token_level_loss = token_level_loss

    def forward(self, per_token_logps: Tensor, loss_mask: Tensor, *sizes: Any, **more_sizes: Any) -> Tensor:
        """-log-prob, aggregated; ``sizes`` as in ``aggregate_loss``: dp_size, batch_num_tokens, global_batch_size."""
        return aggregate_loss(-per_token_logps, loss_mask, self.token_level_loss, *sizes, **more_sizes)


class PolicyLoss(nn.Module):
    """PPO's or GSPO's policy loss, corrected for the difference to the rollout's engine.

    Raises ValueError for settings that OpenRLHF refuses.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] | list[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("policy_loss_type", policy_loss_type, ("ppo", "gspo")),
            ("is_correction_level", is_correction_level, ("off", "token", "seq")),
            ("is_correction_mode", is_correction_mode, ("mask", "clip")),
            ("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv")),
        ):
            if value not in choices:
                raise ValueError(f"PolicyLoss: {name} must be one of {', '.join(choices)}; got {value!r}")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                "PolicyLoss: is_correction_mode 'clip' needs is_correction_level 'token' and gating 'ratio'"
            )
        if is_correction_gating != "ratio" and is_correction_level != "off" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"PolicyLoss: is_correction_gating {is_correction_gating!r} has no lower bound; "
                f"got is_correction_threshold {is_correction_threshold}: set the first to 0"
            )
        self.clips: dict[str, Any] = {"clip_low": clip_eps_low, "clip_high": clip_eps_high}
        self.dual_clip = dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type == "ppo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Tensors are (B, T). -> the loss, the share of tokens clipped by the range, the mean of -(log ratio); and with
        a correction of PPO, the mean of rollout_log_probs - old_log_probs, and the share outside its threshold.
        """
        how = _aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        weighted, rollout_kl, filtered, base = advantages, None, None, old_log_probs
        if self.is_correction_level != "off":
            if rollout_log_probs is None:
                raise ValueError(
                    f"PolicyLoss: is_correction_level {self.is_correction_level!r} needs rollout_log_probs"
                )
            if self.policy_loss_type == "gspo":
                base = rollout_log_probs
            else:
                weights, filtered = self._correction(old_log_probs, rollout_log_probs, action_mask)
                weighted = advantages * weights
                rollout_kl = aggregate(token_kl(rollout_log_probs, old_log_probs, action_mask), action_mask)
        loss_of = clipped_policy_loss if self.policy_loss_type == "ppo" else gspo_loss
        loss = loss_of(log_probs, base, weighted, action_mask, **self.clips, dual_clip=self.dual_clip, **how).loss
        clipped = loss_of(log_probs.detach(), base, advantages, action_mask, **self.clips).clip_fraction
        kl = -aggregate(token_kl(log_probs.detach(), old_log_probs, action_mask), action_mask)
        return loss, clipped, kl, rollout_kl, filtered

    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """-> factors of the advantages (B, T), and the share of tokens or sequences outside the threshold."""
        low, high = self.is_correction_threshold
        sequences = self.is_correction_level == "seq"
        if self.is_correction_gating == "ratio":
            level = "sequence-mean" if sequences else "token"
            kept = truncated_importance_weights(old, rollout, mask, level=level, outside="zero", low=low, high=high) > 0
        else:
            kept = self._divergence(old, rollout, mask) <= high
        if sequences:
            kept = kept & (mask != 0)
            filtered = 1 - kept.any(-1).float().mean()
        else:
            filtered = aggregate((~kept).float(), mask)
        if self.is_correction_mode == "clip":
            return truncated_importance_weights(old, rollout, mask, low=low, high=high), filtered
        ratios = truncated_importance_weights(old, rollout, mask, high=float("inf"))
        return torch.where(kept, ratios, 0.0), filtered

    def _divergence(self, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
        """(B, T), or (B, 1) by the sequence: the divergence of the sampled token against all others."""
        p, q = (each.detach().exp().clamp(1e-6, 1 - 1e-6) for each in (rollout, old))
        if self.is_correction_gating == "tv":
            divergence = (p - q).abs()
        else:
            divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        divergence = torch.where(mask != 0, divergence, 0.0)
        if self.is_correction_level == "token":
            return divergence
        return divergence.sum(-1, keepdim=True) / (mask != 0).sum(-1, keepdim=True)


class ValueLoss(nn.Module):
    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps, self.token_level_loss = clip_eps, token_level_loss

    def forward(
        self, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor, *sizes: Any, **more_sizes: Any
    ) -> Tensor:
        """The clipped value loss; ``sizes`` as in ``aggregate_loss``."""
        how = _aggregation(self.token_level_loss, *sizes, **more_sizes)
        return clipped_value_loss(values, old_values, returns, action_mask, clip=self.clip_eps, **how).loss


class PairWiseLoss(nn.Module):
    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        return pairwise_loss(
            chosen_reward.flatten(), reject_reward.flatten(), None if margin is None else margin.flatten()
        )


class LogExpLoss(nn.Module):
    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """The same as ``PairWiseLoss``, and as in OpenRLHF without the margin."""
        return pairwise_loss(chosen_reward.flatten(), reject_reward.flatten())


class DPOLoss(nn.Module):
    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        loss_type = "ipo" if ipo else "sigmoid"
        self.options: dict[str, Any] = {"beta": beta, "loss_type": loss_type}
        if not ipo:  # which ignores it
            self.options["label_smoothing"] = label_smoothing

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) each -> the loss, and the rewards (N,) of chosen and rejected responses."""
        result = dpo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, **self.options
        )
        return result.loss, result.chosen_rewards, result.rejected_rewards


# ---- RemoteExperienceMaker ------------------------------------------------------------------------------------------


def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """GAE that does not skip masked tokens, as OpenRLHF's: they have value 0 and reward 0. ``self`` is not used."""
    return gae(_live(rewards, action_mask), _live(values, action_mask), gamma=gamma, lam=lambd)


def get_cumulative_returns(self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    """Discounted sums of the rewards from each token on; masked tokens have reward 0 and take a step of time."""
    return gae(_live(rewards, action_mask), torch.zeros_like(rewards), gamma=gamma, lam=1.0)[0]


def _live(tensor: Tensor, mask: Tensor | None) -> Tensor:
    return tensor if mask is None else torch.where(mask != 0, tensor, 0.0)


# ---- the patch ------------------------------------------------------------------------------------------------------

_patch = Patch(
    "openrlhf",
    versions=("0.11", "0.11"),
    replacements=[
        *(
            Replacement(f"openrlhf.models.utils.{function.__name__}", function)
            for function in (log_probs_from_logits, compute_entropy, compute_approx_kl)
        ),
        *(
            Replacement(f"openrlhf.models.loss.{function.__name__}", function)
            for function in (aggregate_loss, SFTLoss, PolicyLoss, ValueLoss, PairWiseLoss, LogExpLoss, DPOLoss)
        ),
    ],
    left={
        "the lm head": "Actor.forward makes the logits; log-probs and entropy are ours from there on",
        "RemoteExperienceMaker.get_advantages_and_returns and get_cumulative_returns": (
            "a small part of a step: assign ours to the class"
        ),
    },
    step=Step(
        "openrlhf.trainer.ray.ppo_actor.ActorPPOTrainer.training_step", log_probs_from_logits, lambda trainer: True
    ),
)
patch, unpatch, patched, report = _patch.patch, _patch.unpatch, _patch.patched, _patch.report
