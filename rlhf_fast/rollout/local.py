"""Sampling with transformers' own generate, on the shared base, in this process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf_fast.data import PromptRow, collate_prompts
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase


@dataclass(frozen=True)
class Response:
    """One answer. ``token_ids`` ends with the stop token where ``stopped``; nothing follows it.

    ``text`` is the answer without that stop token, without padding and white space around it. Other special tokens
    (``<think>``) are in it, unless ``generate`` was asked to skip them.
    """

    row: PromptRow
    token_ids: list[int]
    stopped: bool
    text: str


class RealTokensOnly(LogitsProcessor):
    """Leaves rows of the embedding that no token of the tokenizer uses out of the softmax, as training does."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.vocab_size :] = -torch.inf
        return scores


@torch.no_grad()
def generate(
    base: SharedBase,
    role: str | None,
    rows: Sequence[PromptRow],
    *,
    response_length: int,
    temperature: float,
    batch_size: int,
    skip_special_tokens: bool = False,
) -> list[Response]:
    """One sampled response a prompt, in the order of ``rows``, cut at the first stop token.

    The distribution sampled from is the one that is trained: the full softmax at ``temperature``, without top-k, top-p
    or penalties, whatever the model folder's generation_config says. Prompts are padded left, ``batch_size`` at a time.
    Raises UserError for a prompt of no tokens, after which nothing could be predicted, and for a model whose samples
    do not follow the log-probs that are trained.
    """
    base.check_sampling()
    empty = [str(row.index) for row in rows if not row.input_ids]
    if empty:
        raise UserError(f"prompts of no tokens in rows {', '.join(empty)}: nothing predicts the first token there")
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
    processors = LogitsProcessorList([RealTokensOnly(base.vocab_size)])
    responses = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = collate_prompts(part, base.pad_id)
        with base.role(role):
            sequences = base.model.generate(
                input_ids=batch["input_ids"].to(base.device),
                attention_mask=batch["attention_mask"].to(base.device),
                generation_config=settings,
                logits_processor=processors,
            )
        new_tokens = sequences[:, batch["input_ids"].shape[1] :].tolist()
        responses += [
            _cut(base, row, tokens, skip_special_tokens) for row, tokens in zip(part, new_tokens, strict=True)
        ]
    return responses


def _cut(base: SharedBase, row: PromptRow, tokens: list[int], skip_special_tokens: bool = False) -> Response:
    end = next((index for index, token in enumerate(tokens) if token in base.stop_ids), None)
    said = [token for token in tokens[:end] if token != base.pad_id]
    text = base.tokenizer.decode(said, skip_special_tokens=skip_special_tokens).strip()
    kept = tokens if end is None else tokens[: end + 1]
    return Response(row=row, token_ids=kept, stopped=end is not None, text=text)
