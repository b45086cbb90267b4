"""The samples that PPO writes at each step: a few responses of the rollout, the most telling ones token by token."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf_fast.config import PPOConfig
from rlhf_fast.recipes.experience import Experience
from rlhf_fast.recipes.stage import Stage
from rlhf_fast.rollout import Response

FIRST_SAMPLES = 2  # written beside those of the highest KL, the highest and the lowest score
WITH_TOKENS = ("highest_kl", "highest_score")


def train_samples(
    stage: Stage[PPOConfig],
    responses: Sequence[Response],
    experiences: Sequence[Experience],
    scores: Sequence[float],
    extras: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """Rows of samples.jsonl. ``extras``: what reward functions logged for each response."""
    kl = torch.cat([experience.kl for experience in experiences]).tolist()
    samples = []
    for index, why in _chosen(scores, kl).items():
        row = {"split": "train", "why": why, **sample(responses[index], scores[index]), "kl": round(kl[index], 4)}
        if why in WITH_TOKENS:
            row |= _tokens(stage, responses[index], experiences, index)
        if extras:
            row["extra"] = {name: _cell(each[index]) for name, each in extras.items()}
        samples.append(row)
    return samples


def _chosen(scores: Sequence[float], kl: Sequence[float]) -> dict[int, str]:
    """The responses of a rollout that are written: their places, and why each was chosen."""
    chosen = {index: "first" for index in range(min(FIRST_SAMPLES, len(scores)))}
    places = range(len(scores))
    chosen[min(places, key=scores.__getitem__)] = "lowest_score"
    chosen[max(places, key=scores.__getitem__)] = "highest_score"
    chosen[max(places, key=kl.__getitem__)] = "highest_kl"
    return chosen


def _tokens(
    stage: Stage[PPOConfig], response: Response, experiences: Sequence[Experience], index: int
) -> dict[str, list[Any]]:
    """The response token by token: its text, its log-ratio to the reference in nats, its advantage."""
    for experience in experiences:
        if index < len(experience.scores):
            break
        index -= len(experience.scores)
    live = experience.mask[index]
    kl = (experience.logprobs[index] - experience.ref_logprobs[index])[live]
    return {
        "tokens": [stage.base.tokenizer.decode([token]) for token in response.token_ids],
        "token_kl": [round(value, 4) for value in kl.tolist()],
        "token_advantage": [round(value, 4) for value in experience.advantages[index][live].tolist()],
    }


def sample(response: Response, number: float) -> dict[str, Any]:
    prompt = response.row.prompt
    shown = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
    return {
        "index": response.row.index,
        "prompt": shown,
        "response": response.text,
        "stopped": response.stopped,
        "length": len(response.token_ids),
        "score": number,
    }


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else str(value)
