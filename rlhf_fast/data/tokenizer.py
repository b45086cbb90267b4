"""Prepares a tokenizer for training: an EOS, a PAD that is not EOS, and the requested chat template."""

import re
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf_fast.errors import UserError

PAD_NAME = "<|pad|>"
# Parts of names of special tokens that are good candidates for PAD, best first.
LIKELY_PADS = ("pad", "endoftext", "unk", "reserved")


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, chat_template: str | None = None
) -> list[str]:
    """Changes the tokenizer in place; returns one line for each change.

    PAD must differ from EOS; otherwise every EOS is masked as padding and never learnt. The embedding, with
    ``vocab_size`` rows, is not resized. PAD is the first of these that is possible: the current PAD; an unused special
    token; a new token in a spare row; the highest ordinary id (safe, because masks, not ids, define padding).
    ``chat_template``: a file or a Jinja string. Raises UserError if there is no EOS or the template is broken.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"{_name(tokenizer)} has no EOS token, so no response could end; set eos_token in its config")
    notes = []
    if chat_template is not None:
        notes.append(_set_chat_template(tokenizer, chat_template))
    pad = tokenizer.pad_token_id
    if pad is None or pad == tokenizer.eos_token_id or pad >= vocab_size:
        notes.append(_set_pad(tokenizer, vocab_size))
    return notes


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path}".rstrip()


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str:
    text, origin = chat_template, "the string given"
    if "{" not in chat_template:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise UserError(f"--chat_template {chat_template}: no such file, and no Jinja template (it has no '{{')")
        text, origin = path.read_text(encoding="utf-8"), chat_template
    tokenizer.chat_template = text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except jinja2.TemplateError as error:
        raise UserError(f"--chat_template {origin}: the template fails on one user turn ({error}); mend it") from error
    return f"chat template: {origin}"


def _set_pad(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    before = f"PAD was {tokenizer.pad_token!r}" if tokenizer.pad_token is not None else "there was no PAD"
    unused = _unused_special_tokens(tokenizer, vocab_size)
    if unused:
        tokenizer.pad_token = unused[0]
        how = "a special token nothing else uses"
    elif len(tokenizer) < vocab_size:
        tokenizer.add_special_tokens({"pad_token": PAD_NAME})
        how = "a new token in a spare row of the embedding"
    else:
        special = set(tokenizer.added_tokens_decoder)
        highest = max(token for token in tokenizer.get_vocab().values() if token < vocab_size and token not in special)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(highest)
        how = "an ordinary token, since no other is free; masks, not ids, tell padding from text"
    now = f"PAD is now {tokenizer.pad_token!r} (id {tokenizer.pad_token_id})"
    return f"{before}, EOS is {tokenizer.eos_token!r}: {now}, {how}"


def _unused_special_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """The special tokens that are neither EOS nor BOS nor in the chat template, the best candidate for PAD first."""
    template = str(tokenizer.chat_template or "")
    unused = [
        (index, token.content)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
        and index < vocab_size
        and index not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
        and token.content not in template
    ]

    def rank(candidate: tuple[int, str]) -> tuple[int, int]:
        index, content = candidate
        likely = [place for place, name in enumerate(LIKELY_PADS) if re.search(name, content, re.IGNORECASE)]
        return (min(likely, default=len(LIKELY_PADS)), index)

    return [content for _, content in sorted(unused, key=rank)]
