"""From one score an episode to one reward a token: the KL penalty, its controller, the missing-EOS rule, scaling."""

from dataclasses import dataclass

import torch


def apply_missing_eos(
    scores: torch.Tensor, stopped: torch.Tensor, *, penalty: float, fixed_score: float | None
) -> torch.Tensor:
    """Scores (B,) of responses without a stop token (``stopped`` False) get ``penalty`` subtracted, or are replaced by
    ``fixed_score``. Source: lm-human-preferences; N+ Implementation Details of RLHF with PPO."""
    unfinished = scores - penalty if fixed_score is None else torch.full_like(scores, fixed_score)
    return torch.where(stopped, scores, unfinished)


def token_rewards(
    kl: torch.Tensor, scores: torch.Tensor, response_mask: torch.Tensor, *, kl_coef: float
) -> torch.Tensor:
    """−β·KL_t at every live token, plus the score at the last one.

    Args:
        kl: (B, R) per-token KL estimates.
        scores: (B,), one an episode.
        response_mask: (B, R) bool, True = a token of the response. A row without any gets no reward.
        kl_coef: β.

    Returns:
        (B, R), 0 where the mask is False. Source: Ouyang et al. 2022 (InstructGPT), equation 2 per token, as in
        lm-human-preferences.
    """
    rewards = torch.where(response_mask, -kl_coef * kl, torch.zeros_like(kl))
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = torch.where(response_mask, positions, -1).amax(dim=1, keepdim=True)
    return rewards + torch.where(positions == last, scores[:, None], torch.zeros_like(rewards))


@dataclass
class KLController:
    """β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon), KL summed over the sequence; ``target`` None keeps β fixed.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.
    """

    kl_coef: float
    target: float | None
    horizon: float

    def update(self, sequence_kl: float, episodes: int) -> None:
        """``sequence_kl``: mean over the rollout's ``episodes`` of KL summed over each response, in nats."""
        if self.target is not None:
            error = min(max(sequence_kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * episodes / self.horizon


@dataclass
class RunningMoments:
    """Mean and variance of every score so far, merged batch by batch (Chan, Golub, LeVeque 1979)."""

    count: float = 0.0
    mean: float = 0.0
    sum_of_squares: float = 0.0

    def update(self, scores: torch.Tensor) -> None:
        batch = scores.double()
        count, mean = batch.numel(), batch.mean().item()
        squares = (batch - mean).square().sum().item()
        delta, total = mean - self.mean, self.count + count
        self.sum_of_squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased; 1 until two scores have been seen that differ."""
        variance = self.sum_of_squares / (self.count - 1) if self.count > 1 else 0.0
        return variance**0.5 if variance > 0 else 1.0
