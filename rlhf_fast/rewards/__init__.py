"""Scores and what is made of them: Python functions, reward shaping, the quality of a reward model."""

from rlhf_fast.rewards.functions import Functions
from rlhf_fast.rewards.quality import Quality, assess
from rlhf_fast.rewards.shaping import KLController, RunningMoments, apply_missing_eos, token_rewards

__all__ = [
    "Functions",
    "KLController",
    "Quality",
    "RunningMoments",
    "apply_missing_eos",
    "assess",
    "token_rewards",
]
