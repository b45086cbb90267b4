"""The fast engine: reads the prompts once; then every step samples one token for each unfinished row."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data import PromptRow, collate_prompts
from rlhf_fast.errors import UserError
from rlhf_fast.models import Merged, SharedBase
from rlhf_fast.rollout.cache import CachedDecoder
from rlhf_fast.rollout.response import Response, cut
from rlhf_fast.rollout.sampling import sample
from rlhf_fast.rollout.trial import why_not_fast

# Finished rows are removed from the batch only when there are at least this many, and a quarter of the batch. A step is
# bound by reading the weights, so a few rows less do not make it faster.
LEAVING = 4


class Step(NamedTuple):
    """The result of one step: the indices of the rows that were live, and a token and its log-prob for each."""

    rows: list[int]
    tokens: list[int]
    logprobs: list[float]


class Generation:
    """Samples responses step by step with the fast engine::

        generation = Generation(base, "policy", rows, response_length=64, temperature=1.0)
        while generation.live:
            generation.step()
        responses = generation.responses()

    The role's adapter is merged into a copy of the weights that it adapts, created here or given as ``merged``. Between
    steps the base is unchanged. To choose tokens in another way, read ``logits`` and call ``append``.

    Attributes:
        live: indices of the unfinished rows.
        batch: indices of the rows of ``logits``: the live ones, and finished ones not yet removed.
        logits: (B, V) float32, of the next token, without padded vocabulary columns, before the temperature.

    ``uniforms``: (rows, response_length) float64 on the CPU, the random numbers of the draws; None = drawn from torch's
    global generator. A row's tokens depend only on its own numbers, up to the rounding of products with other rows.

    Raises UserError for a base that the fast engine cannot run, an empty prompt, or too little memory for the copy.
    """

    def __init__(
        self,
        base: SharedBase,
        role: str | None,
        rows: Sequence[PromptRow],
        *,
        response_length: int,
        temperature: float = 1.0,
        merged: Merged | None = None,
        uniforms: Tensor | None = None,
    ) -> None:
        check_call(rows, response_length, temperature)
        fault = why_not_fast(base)
        if fault is not None:
            raise UserError(f"{type(base.model).__name__}: {fault}: use generate, which has another engine")
        self.base, self.rows, self._vocabulary = base, list(rows), base.vocabulary_of(role)
        self.response_length, self.temperature = response_length, temperature
        self.uniforms = draws(len(rows), response_length) if uniforms is None else uniforms
        self.tokens: list[list[int]] = [[] for _ in rows]
        self.logprobs: list[list[float]] = [[] for _ in rows]
        self.live = self.batch = list(range(len(rows)))
        if rows:
            prompts = collate_prompts(rows, base.pad_id)
            mask = prompts["attention_mask"].to(base.device)
            self._decoder = CachedDecoder(base, base.merged(role) if merged is None else merged, mask, response_length)
            self._read(prompts["input_ids"].to(base.device))

    def step(self) -> Step:
        """Samples the next token of each live row. Raises UserError if the model's logits are not finite, and
        ValueError if no row is live."""
        self._check_live()
        column = len(self.tokens[self.live[0]])
        uniforms = self.uniforms[self.batch, column].to(self.base.device)
        tokens, logprobs = sample(self.logits, self.temperature, uniforms)
        return self.append(tokens, logprobs)

    def append(self, tokens: Tensor, logprobs: Tensor) -> Step:
        """Appends ``tokens`` (B,) int64 with their ``logprobs`` (B,) to the rows of ``batch``."""
        self._check_live()
        if not tokens.shape == logprobs.shape == (len(self.batch),):
            expected = f"tokens and logprobs must have shape ({len(self.batch)},), one a row of `batch`"
            raise ValueError(f"{expected}; got {tuple(tokens.shape)} and {tuple(logprobs.shape)}")
        drawn = dict(zip(self.batch, zip(tokens.tolist(), logprobs.tolist(), strict=True), strict=True))
        added = Step(self.live, *(list(column) for column in zip(*(drawn[row] for row in self.live), strict=True)))
        if not all(math.isfinite(number) for number in added.logprobs):
            raise UserError(f"{type(self.base.model).__name__}: its logits are not finite in {self.base.dtype}")
        for row, token, logprob in zip(*added, strict=True):
            self.tokens[row].append(token)
            self.logprobs[row].append(logprob)
        self.live = [row for row in self.live if not self._finished(self.tokens[row])]
        if self.live:
            self._read(self._without_finished(tokens)[:, None])
        return added

    def responses(self, *, skip_special_tokens: bool = False) -> list[Response]:
        """The responses so far, in the order of the rows."""
        drawn = zip(self.rows, self.tokens, self.logprobs, strict=True)
        return [cut(self.base, row, tokens, logprobs, skip_special_tokens) for row, tokens, logprobs in drawn]

    def _check_live(self) -> None:
        if not self.live:
            raise ValueError("every row is finished: go on while `live` is not empty")

    def _finished(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.base.stop_ids or len(tokens) == self.response_length

    @torch.no_grad()
    def _read(self, ids: Tensor) -> None:
        raw = self._vocabulary.raw(self._decoder.read(ids))[:, : self.base.vocab_size]
        self.logits = self._vocabulary.scaled(raw.float())

    def _without_finished(self, tokens: Tensor) -> Tensor:
        """Removes finished rows from the batch if there are enough of them. Returns the ``tokens`` of the others."""
        finished = len(self.batch) - len(self.live)
        if finished < max(LEAVING, len(self.batch) / 4):
            return tokens
        live = set(self.live)
        kept = torch.tensor([place for place, row in enumerate(self.batch) if row in live], device=tokens.device)
        self.batch = self.live
        self._decoder.keep(kept)
        return tokens[kept]


def check_call(rows: Sequence[PromptRow], response_length: int, temperature: float) -> None:
    """Raises UserError for an empty prompt, and ValueError for an invalid length or temperature."""
    empty = [str(row.index) for row in rows if not row.input_ids]
    if empty:
        raise UserError(f"prompts of no tokens in rows {', '.join(empty)}: nothing predicts the first token there")
    if response_length < 1:
        raise ValueError(f"response_length must be 1 or above; got {response_length}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")


def draws(rows: int, response_length: int) -> Tensor:
    """Uniform numbers in [0, 1), (rows, response_length) float64, from torch's global generator on the CPU."""
    return torch.rand(rows, response_length, dtype=torch.float64)
