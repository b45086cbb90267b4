"""The reference engine: transformers' generate, with PEFT computing the adapter."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf_fast.data import PromptRow, collate_prompts
from rlhf_fast.models import SharedBase
from rlhf_fast.rollout.response import Response, cut


class RealTokensOnly(LogitsProcessor):
    """Excludes columns of the vocabulary that no token of the tokenizer uses from the softmax, as in training.

    ``logprobs`` collects the (B,) log-probs at ``temperature`` of the sampled tokens. A token is known only when the
    processor is called for the next one.
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
        """Appends the log-probs of the last column of ``input_ids``, which was sampled from the previous scores."""
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
    """Samples one response per prompt, all in one batch; see ``generate``."""
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
