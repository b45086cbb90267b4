"""Pads prompts and responses to one batch: prompts end at the same column, and responses begin after it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from rlhf_fast.rollout.response import Response


@dataclass(frozen=True)
class EpisodeBatch:
    """B episodes: prompts padded left to P tokens, responses padded right to R. All on one device.

    Attributes:
        responses: the episodes, in the order of the rows.
        input_ids, attention_mask: (B, P + R) int64; the mask's 1 = token.
        targets: (B, R) int64, the response tokens.
        response_mask: (B, R) bool, True = a token of the response (its stop token included).
        stopped: (B,) bool, True = ended by a stop token.
        sampled_logprobs: (B, R) float32, the log-prob with which each token was sampled; 0 outside ``response_mask``,
            NaN for a response without log-probs.
    """

    responses: list[Response]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    response_mask: torch.Tensor
    stopped: torch.Tensor
    sampled_logprobs: torch.Tensor

    def before_response(self, per_position: torch.Tensor) -> torch.Tensor:
        """(B, P + R, ...) -> (B, R, ...): for token t the entry of position t − 1, which predicts the token."""
        width = self.targets.shape[1]
        return per_position[:, -width - 1 : -1]


def collate_episodes(responses: Sequence[Response], pad_id: int, device: torch.device) -> EpisodeBatch:
    """Episodes as one batch, no wider than its longest prompt and its longest response."""
    prompts = [torch.tensor(response.row.input_ids, dtype=torch.long) for response in responses]
    answers = [torch.tensor(response.token_ids, dtype=torch.long) for response in responses]
    left = pad_sequence(prompts, batch_first=True, padding_value=pad_id, padding_side="left")
    left_mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    targets = pad_sequence(answers, batch_first=True, padding_value=pad_id)
    drawn = [torch.tensor(r.logprobs or [math.nan] * len(r.token_ids)) for r in responses]
    response_mask = pad_sequence([torch.ones_like(a) for a in answers], batch_first=True)
    return EpisodeBatch(
        responses=list(responses),
        input_ids=torch.cat([left, targets], dim=1).to(device),
        attention_mask=torch.cat([left_mask, response_mask], dim=1).to(device),
        targets=targets.to(device),
        response_mask=response_mask.bool().to(device),
        stopped=torch.tensor([response.stopped for response in responses], device=device),
        sampled_logprobs=pad_sequence(drawn, batch_first=True).to(device),
    )
