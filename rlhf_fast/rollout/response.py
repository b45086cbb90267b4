"""One sampled answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_fast.data import PromptRow
from rlhf_fast.models import SharedBase


@dataclass(frozen=True)
class Response:
    """One answer. ``token_ids`` ends with the stop token where ``stopped``; nothing follows it.

    ``text`` is the answer without that stop token, without padding and white space around it. Other special tokens
    (``<think>``) are in it, unless ``generate`` was asked to skip them. ``logprobs``: one a token, in nats, of the
    distribution that it was drawn from: the full softmax at the sampling temperature over the real vocabulary.
    """

    row: PromptRow
    token_ids: list[int]
    stopped: bool
    text: str
    logprobs: list[float] = field(default_factory=list)


def cut(
    base: SharedBase, row: PromptRow, tokens: Sequence[int], logprobs: Sequence[float], skip_special_tokens: bool
) -> Response:
    """The response up to its first stop token, whatever follows there."""
    end = next((index for index, token in enumerate(tokens) if token in base.stop_ids), None)
    said = [token for token in tokens[:end] if token != base.pad_id]
    text = base.tokenizer.decode(said, skip_special_tokens=skip_special_tokens).strip()
    kept = slice(None if end is None else end + 1)
    return Response(row, list(tokens[kept]), end is not None, text, list(logprobs[kept]))
