"""Sampling responses, and episodes as batches."""

from rlhf_fast.rollout.batch import EpisodeBatch, collate_episodes
from rlhf_fast.rollout.local import Response, generate

__all__ = ["EpisodeBatch", "Response", "collate_episodes", "generate"]
