"""A sampled response."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_fast.data import PromptRow
from rlhf_fast.models import SharedBase


@dataclass(frozen=True)
class Response:
    """A response. If ``stopped``, ``token_ids`` ends with the stop token.

    ``text``: the response without stop token, padding and surrounding white space. It includes other special tokens
    (such as ``<think>``), unless ``skip_special_tokens`` was set. ``logprobs``: one per token, in nats, under the
    distribution that was sampled: the full softmax at the sampling temperature, without padded vocabulary columns.
    """

    row: PromptRow
    token_ids: list[int]
    stopped: bool
    text: str
    logprobs: list[float] = field(default_factory=list)


def cut(
    base: SharedBase, row: PromptRow, tokens: Sequence[int], logprobs: Sequence[float], skip_special_tokens: bool
) -> Response:
    """The response up to and including its first stop token."""
    end = next((index for index, token in enumerate(tokens) if token in base.stop_ids), None)
    said = [token for token in tokens[:end] if token != base.pad_id]
    text = base.tokenizer.decode(said, skip_special_tokens=skip_special_tokens).strip()
    kept = slice(None if end is None else end + 1)
    return Response(row, list(tokens[kept]), end is not None, text, list(logprobs[kept]))
