"""Analyses a chat template: how it ends an assistant's turn, and where a turn's content is in the rendered text."""

import re
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.special import MARK
from rlhf_fast.data.turns import Turn
from rlhf_fast.errors import UserError
from rlhf_fast.text import one_line

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Refused(Exception):
    """The chat template refuses these turns; the message is its reason."""


@dataclass(frozen=True)
class TurnEnd:
    """The token that ends an assistant's turn. ``text``: what the template writes from the end of the content up to and
    including the token. ``added``: the template writes no such token, so EOS is appended and ``text`` is empty."""

    token: int
    name: str
    text: str
    added: bool


class ChatTemplate:
    """One chat template of a tokenizer. ``text``: the template; None = the tokenizer has none, and EOS ends a response.

    Attributes:
        end: what ends an assistant's turn.
        role_marks: added tokens that the template writes between turns although they are not marked as special.
            Tokens that open and close a block, such as ``<think>``, are not among them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None) -> None:
        self._tokenizer, self._text = tokenizer, text
        self.marks_assistant = bool(GENERATION_MARK.search(text or ""))
        added = list(tokenizer.added_tokens_decoder.values())
        names = sorted({token.content for token in added} - {""}, key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._wants_parts = False
        self._wants_parts = text is not None and not self._writes_content() and self._writes_content(parts=True)
        self.end = self._turn_end()
        self.role_marks = self._role_marks({token.content for token in added if not token.special})

    def _writes_content(self, *, parts: bool = False) -> bool:
        """Whether the template writes a user's text that is given as a string or as a list of parts."""
        self._wants_parts = parts
        try:
            return MARK in self.render([{"role": "user", "content": MARK}], {}, answer_next=True)
        except Refused:
            return False

    def _role_marks(self, ordinary: set[str]) -> frozenset[str]:
        try:
            skeleton = self.render([*ASKED, ASKED[0]], {}, answer_next=True) if self._text is not None else ""
        except Refused:
            skeleton = ""
        written = set(self._token.findall(skeleton)) & ordinary
        return frozenset(name for name in written if f"{name[0]}/{name[1:]}" not in ordinary and name[1:2] != "/")

    def prepared(self, turns: list[Turn]) -> list[Turn]:
        """The turns in the form that the template expects: content as a string or as a list of parts."""
        if not self._wants_parts:
            return turns
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]

    def render(self, turns: list[Turn], arguments: dict[str, Any], *, answer_next: bool = False) -> str:
        """The template's rendering of turns; ``answer_next`` adds the generation prompt.

        Raises Refused with the template's reason.
        """
        options = {**arguments, "add_generation_prompt": answer_next, "chat_template": self._text}
        try:
            return str(self._tokenizer.apply_chat_template(self.prepared(turns), tokenize=False, **options))
        except jinja2.TemplateError as error:
            raise Refused(" ".join(str(error).split())) from error
        except Exception as error:  # Python errors in the template's expressions, such as a missing key or 1 / 0
            raise Refused(f"{type(error).__name__}: {' '.join(str(error).split())}") from error

    def tokens_and_marks(self, turns: list[Turn], arguments: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Token ids, and a mask with 1 on the tokens inside the template's {% generation %} marks."""
        encoded: Any = self._tokenizer.apply_chat_template(
            self.prepared(turns),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **{**arguments, "chat_template": self._text},
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

    def render_marked(
        self, turns: list[Turn], place: int, arguments: dict[str, Any], *, answer_next: bool = False
    ) -> tuple[str, int | None]:
        """Like ``render``, and the position where the content of turn ``place`` ends in the text (None = unknown)."""
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
        """The first added token of the tokenizer that occurs in a text."""
        return self._token.search(text)

    def closes_turns(self, name: str) -> bool:
        """Whether the template also writes this token directly after a user's turn, so that it begins no turn."""
        try:
            text, end = self.render_marked(ASKED, 0, {})
        except Refused:
            return False
        found = self.first_token(text[end:]) if end is not None else None
        return found is not None and found.group() == name

    def _turn_end(self) -> TurnEnd:
        """What the template writes after the content of an assistant's turn that is the last."""
        eos = TurnEnd(int(self._tokenizer.eos_token_id), str(self._tokenizer.eos_token), "", added=True)
        if self._text is None:
            return eos
        try:
            text, end = self.render_marked(ASKED, 1, {})
        except Refused:  # it expects other turns; errors for the data's turns name their row
            return eos
        found = self.first_token(text[end:]) if end is not None else None
        if found is None:
            return eos
        name = found.group()
        token = int(self._tokenizer.convert_tokens_to_ids(name))
        return TurnEnd(token, name, text[end:][: found.end()], added=False)


def template_text(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str | None:
    """The template that transformers uses for a conversation with ``tools``; None if the tokenizer has none."""
    if tokenizer.chat_template is None:
        return None
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise UserError(
            "the tokenizer has several chat templates and none is called 'default' "
            f"({one_line(str(error), 200)}); give one with --chat_template FILE"
        ) from error


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an assistant's turn; None if there is no template or no such token.

    Chat templates of base models often use another token than the tokenizer's EOS; a response must also end there.
    """
    end = ChatTemplate(tokenizer, template_text(tokenizer)).end
    return None if end.added else end.token
