"""A prompt and its response as token ids, with the tokens to train on marked. Never by searching strings."""

import re
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.formats import Example, Text, Turn, format_transcript
from rlhf_fast.errors import UserError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Encoded:
    """``input_ids`` and, of the same length, ``response_mask``: 1 on every token of an assistant turn to train on,
    its end-of-turn token included. The ids end with the last such token. ``prompt_length`` counts the ids before the
    first response token."""

    input_ids: list[int]
    response_mask: list[int]
    prompt_length: int


class ConversationEncoder:
    """Turns prompts and responses into tokens with one tokenizer; ``source`` names the data set in errors."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.marks_assistant = bool(GENERATION_MARK.search(str(tokenizer.chat_template or "")))
        self.added_tokens = frozenset(tokenizer.added_tokens_decoder)
        ends = tokenizer("")["input_ids"]
        self.adds_eos = bool(ends) and ends[-1] == tokenizer.eos_token_id

    def prompt(self, example: Example) -> list[int]:
        """The prompt's tokens, up to and with the mark after which the assistant speaks."""
        prompt = self._plain(example, example.prompt, answer_next=True)
        if isinstance(prompt, str):
            return self._string_prompt(prompt)
        return self._ids(self._render(prompt, example, answer_next=True))

    def response(self, example: Example, response: Text) -> Encoded:
        """The prompt and one response to it; every assistant turn of the response is marked, none of the prompt."""
        prompt = self._plain(example, example.prompt, answer_next=True)
        if isinstance(prompt, str):
            text = self._plain(example, response, answer_next=False)
            if isinstance(text, list):
                raise TypeError("a string prompt with a chat list as its response: formats.py lets none through")
            return self._strings(prompt, text)
        if isinstance(response, str):
            raise TypeError("a chat list as prompt with a string as its response: formats.py lets none through")
        if self.marks_assistant:
            return self._chat_by_marks(example, prompt, response)
        return self._chat_by_prefixes(example, prompt, response)

    def _plain(self, example: Example, text: Text, *, answer_next: bool) -> Text:
        """The transcript form, where the turns come from a transcript and there is no chat template; else as it is."""
        if isinstance(text, str) or self.tokenizer.chat_template is not None:
            return text
        if not example.transcript:
            raise UserError(
                f"{self.source}, row {example.index}: a list of chat turns, but the tokenizer has no chat template; "
                "give one with --chat_template FILE, or use string columns"
            )
        if answer_next:
            return format_transcript(text, answer_next=True)
        # The prompt ends with "Assistant:", so the first answer comes without its mark.
        return " " + text[0]["content"] + format_transcript(text[1:])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _string_prompt(self, prompt: str) -> list[int]:
        ids = list(self.tokenizer(prompt)["input_ids"])
        return ids[:-1] if self.adds_eos else ids

    def _strings(self, prompt: str, response: str) -> Encoded:
        prompt_ids, response_ids = self._string_prompt(prompt), self._ids(response)
        if response_ids[-1:] != [self.tokenizer.eos_token_id]:
            response_ids.append(self.tokenizer.eos_token_id)
        mask = [0] * len(prompt_ids) + [1] * len(response_ids)
        return Encoded(prompt_ids + response_ids, mask, len(prompt_ids))

    def _render(self, turns: list[Turn], example: Example, *, answer_next: bool = False) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next))
        except jinja2.TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"{self.source}, row {example.index}: the chat template refuses these turns ({roles}): {error}"
            ) from error

    def _chat_by_prefixes(self, example: Example, prompt: list[Turn], response: list[Turn]) -> Encoded:
        """Render up to each assistant turn and through it: what the second adds to the first is that turn."""
        turns, text = prompt + response, ""
        ids: list[int] = []
        mask: list[int] = []
        prompt_length = 0
        for end in range(len(prompt), len(turns)):
            if turns[end]["role"] != "assistant":
                continue
            for rendered, trained in (
                (self._render(turns[:end], example, answer_next=True), 0),
                (self._render(turns[: end + 1], example), 1),
            ):
                if not rendered.startswith(text):
                    raise self._no_prefix(example, end)
                ids = self._extend(ids, text, rendered)
                mask += [trained] * (len(ids) - len(mask))
                text = rendered
                prompt_length = prompt_length or len(ids)
            self._unmark_white_space(ids, mask)
        return self._finish(example, ids, mask, prompt_length)

    def _extend(self, ids: list[int], text: str, longer: str) -> list[int]:
        """The tokens of ``longer``, which begins with ``text``, whose tokens ``ids`` stay as they are.

        Where a token would reach over the boundary the rest is tokenised by itself: generation, too, starts from the
        prompt's tokens and cannot merge into them.
        """
        whole = self._ids(longer)
        return whole if whole[: len(ids)] == ids else ids + self._ids(longer[len(text) :])

    def _unmark_white_space(self, ids: list[int], mask: list[int]) -> None:
        """Templates write a line break after the end-of-turn token; the turn ends with the token."""
        end = len(ids)
        while end > 0 and mask[end - 1] and not str(self.tokenizer.decode([ids[end - 1]])).strip():
            end -= 1
            mask[end] = 0

    def _chat_by_marks(self, example: Example, prompt: list[Turn], response: list[Turn]) -> Encoded:
        """The template says itself, with {% generation %}, what the assistant wrote."""
        prompt_ids = self._ids(self._render(prompt, example, answer_next=True))
        self._render(prompt + response, example)  # a template that refuses the turns is told by row
        encoded: Any = self.tokenizer.apply_chat_template(
            prompt + response, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, marks = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        if ids[: len(prompt_ids)] != prompt_ids:
            raise self._no_prefix(example, len(prompt))
        mask = [int(mark) if place >= len(prompt_ids) else 0 for place, mark in enumerate(marks)]
        return self._finish(example, ids, mask, len(prompt_ids))

    def _finish(self, example: Example, ids: list[int], mask: list[int], prompt_length: int) -> Encoded:
        """Cut after the last response token, and make sure that it is one that ends the turn."""
        if not any(mask):
            raise UserError(f"{self.source}, row {example.index}: the chat template leaves the response out; mend it")
        end = max(place for place, marked in enumerate(mask) if marked) + 1
        ids, mask = ids[:end], mask[:end]
        if ids[-1] not in self.added_tokens:
            ids, mask = [*ids, self.tokenizer.eos_token_id], [*mask, 1]
        return Encoded(ids, mask, prompt_length)

    def _no_prefix(self, example: Example, end: int) -> UserError:
        return UserError(
            f"{self.source}, row {example.index}: the chat template writes the turns before turn {end + 1} differently "
            "once that turn is added, so its tokens cannot be told apart; give a template with {% generation %} marks "
            "(--chat_template FILE)"
        )
