"""The reference engine: transformers' own generate, with the adapter through PEFT."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf_fast.data import PromptRow, collate_prompts
from rlhf_fast.models import SharedBase
from rlhf_fast.rollout.response import Response, cut


class RealTokensOnly(LogitsProcessor):
    """Leaves rows of the embedding that no token of the tokenizer uses out of the softmax, as training does.

    ``logprobs`` gathers the (B,) log-probs at ``temperature`` of the tokens that were drawn, each when the next token's
    scores come.
    """

    def __init__(self, vocab_size: int, temperature: float) -> None:
        self.vocab_size, self.temperature = vocab_size, temperature
        self.logprobs: list[Tensor] = []
        self._scores: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.note(input_ids)
        scores[:, self.vocab_size :] = -torch.inf
        self._scores = scores
        return scores

    def note(self, input_ids: Tensor) -> None:
        """The last column of ``input_ids`` was drawn from the scores that came before."""
        if self._scores is not None:
            logprobs = (self._scores.float() / self.temperature).log_softmax(dim=1)
            self.logprobs.append(logprobs.gather(1, input_ids[:, -1:])[:, 0])


@torch.no_grad()
def generate_batch(
    base: SharedBase,
    role: str | None,
    rows: Sequence[PromptRow],
    *,
    response_length: int,
    temperature: float,
    skip_special_tokens: bool,
) -> list[Response]:
    """One sampled response a prompt, all in one batch; see ``generate``."""
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=response_length,
        eos_token_id=base.stop_ids,
        pad_token_id=base.pad_id,
        bos_token_id=base.tokenizer.bos_token_id,
    )
    batch = collate_prompts(rows, base.pad_id)
    scores = RealTokensOnly(base.vocab_size, temperature)
    with base.role(role):
        sequences = base.model.generate(
            input_ids=batch["input_ids"].to(base.device),
            attention_mask=batch["attention_mask"].to(base.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([scores]),
        )
    scores.note(sequences)
    tokens = sequences[:, batch["input_ids"].shape[1] :].tolist()
    logprobs = torch.stack(scores.logprobs, dim=1).tolist()
    return [cut(base, *one, skip_special_tokens) for one in zip(rows, tokens, logprobs, strict=True)]
