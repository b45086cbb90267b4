"""Scores and what is made of them: Python functions, reward shaping, the quality of a reward model."""

from rlhf_fast.rewards.functions import Functions, Numbers, call
from rlhf_fast.rewards.quality import Quality, assess
from rlhf_fast.rewards.shaping import KLController, RunningMoments, apply_missing_eos, token_rewards
from rlhf_fast.rewards.view import RunView

__all__ = [
    "Functions",
    "KLController",
    "Numbers",
    "Quality",
    "RunView",
    "RunningMoments",
    "apply_missing_eos",
    "assess",
    "call",
    "token_rewards",
]
