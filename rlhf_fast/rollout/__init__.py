"""Samples responses, and pads episodes to batches."""

from rlhf_fast.rollout.batch import EpisodeBatch, collate_episodes
from rlhf_fast.rollout.engine import choose_engine, generate
from rlhf_fast.rollout.generation import Generation, Step
from rlhf_fast.rollout.response import Response

__all__ = ["EpisodeBatch", "Generation", "Response", "Step", "choose_engine", "collate_episodes", "generate"]
