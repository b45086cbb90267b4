"""What a chat template does with the assistant's turns: how it ends them, and how to find them in what it writes."""

import re
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.special import MARK
from rlhf_fast.data.turns import Turn

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Refused(Exception):
    """The chat template refuses these turns; the text is its reason."""


@dataclass(frozen=True)
class TurnEnd:
    """The token that ends an assistant's turn. ``text``: how the template writes it, after the content and up to it;
    empty where the template writes none and the tokenizer's EOS is put there (``added``)."""

    token: int
    name: str
    text: str
    added: bool


class ChatTemplate:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.marks_assistant = bool(GENERATION_MARK.search(str(tokenizer.chat_template or "")))
        names = sorted({token.content for token in tokenizer.added_tokens_decoder.values()} - {""}, key=len)
        self._token = re.compile("|".join(map(re.escape, reversed(names))) or r"(?!)")
        self.end = self._turn_end()

    def render(self, turns: list[Turn], arguments: dict[str, Any], *, answer_next: bool = False) -> str:
        """The text that the template makes of turns; ``answer_next`` ends it where the assistant speaks.

        Raises Refused with the template's own reason.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, **{**arguments, "add_generation_prompt": answer_next}
                )
            )
        except jinja2.TemplateError as error:
            raise Refused(" ".join(str(error).split())) from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError) as error:
            # a template's Python expressions on turns that they do not expect, such as a missing key
            raise Refused(f"{type(error).__name__}: {' '.join(str(error).split())}") from error

    def render_marked(
        self, turns: list[Turn], place: int, arguments: dict[str, Any], *, answer_next: bool = False
    ) -> tuple[str, int | None]:
        """As ``render``, and where the content of turn ``place`` ends in the text; None where that cannot be told."""
        content = turns[place]["content"]
        kept = len(content.rstrip())
        if kept == 0:
            return self.render(turns, arguments, answer_next=answer_next), None
        marked = {**turns[place], "content": content[:kept] + MARK + content[kept:]}
        text = self.render([*turns[:place], marked, *turns[place + 1 :]], arguments, answer_next=answer_next)
        if text.count(MARK) != 1:
            return self.render(turns, arguments, answer_next=answer_next), None
        return text.replace(MARK, ""), text.index(MARK)

    def first_token(self, text: str) -> re.Match[str] | None:
        """The first of the tokenizer's added tokens that a template's own text spells."""
        return self._token.search(text)

    def closes_turns(self, name: str) -> bool:
        """Whether the template writes this token straight after a user's turn too, so that it begins no turn."""
        try:
            text, end = self.render_marked(ASKED, 0, {})
        except Refused:
            return False
        found = self.first_token(text[end:]) if end is not None else None
        return found is not None and found.group() == name

    def _turn_end(self) -> TurnEnd:
        """What stands after the assistant's content where its turn is the last."""
        eos = TurnEnd(int(self._tokenizer.eos_token_id), str(self._tokenizer.eos_token), "", added=True)
        if self._tokenizer.chat_template is None:
            return eos
        try:
            text, end = self.render_marked(ASKED, 1, {})
        except Refused:  # it wants other turns than these; chat data that it refuses is told with its row
            return eos
        found = self.first_token(text[end:]) if end is not None else None
        if found is None:
            return eos
        name = found.group()
        token = int(self._tokenizer.convert_tokens_to_ids(name))
        return TurnEnd(token, name, text[end:][: found.end()], added=False)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template closes an assistant's turn; None without template or token.

    Chat templates on base models often close with another token than the tokenizer's EOS; a response ends there too.
    """
    end = ChatTemplate(tokenizer).end
    return None if end.added else end.token
