"""Fits a critic that starts as the reward model to the first rollout."""

from collections.abc import Sequence

import torch

from rlhf_fast.config import PPOConfig
from rlhf_fast.ops import gae
from rlhf_fast.recipes.experience import CRITIC, Experience
from rlhf_fast.recipes.stage import Stage


def fit(stage: Stage[PPOConfig], experiences: Sequence[Experience]) -> None:
    """Fits a slope and a shift of the critic's values to the returns by least squares. Applies them to the critic's
    head and to the rollout's values.

    The reward model was trained on whole responses. Its scores of partial responses vary more than the returns and
    hardly correlate with them. The slope is at least 0. Rewards must be set before.
    """
    returns = torch.cat([_returns(e, stage.config.gamma)[e.mask] for e in experiences]).double()
    values = torch.cat([e.values[e.mask] for e in experiences]).double()
    total = stage.sum(
        {
            "count": torch.ones_like(values).sum(),
            "values": values.sum(),
            "returns": returns.sum(),
            "squares": values.square().sum(),
            "products": (values * returns).sum(),
        }
    )
    count = total["count"]
    value, mean = total["values"] / count, total["returns"] / count
    variance, covariance = total["squares"] / count - value**2, total["products"] / count - value * mean
    slope = max(covariance / variance, 0.0) if variance > 0 else 0.0
    shift = mean - slope * value
    for experience in experiences:
        experience.values = torch.where(experience.mask, slope * experience.values + shift, 0.0)
    head = stage.base.heads[CRITIC]
    head.refit(slope, shift)
    stage.values["critic_mean"] = head.mean.item()


def restore(stage: Stage[PPOConfig]) -> None:
    """Restores the calibration constants of the head in a resumed run; its weight is among the parameters."""
    if "critic_mean" in stage.values:
        head = stage.base.heads[CRITIC]
        head.calibrate(stage.values["critic_mean"], head.std.item())


def _returns(experience: Experience, gamma: float) -> torch.Tensor:
    """(b, R): the sum of discounted rewards from each token on, without the critic's values."""
    return gae(experience.rewards, torch.zeros_like(experience.rewards), experience.mask, gamma=gamma, lam=1.0)[1]
