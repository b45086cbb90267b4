"""Encodes a chat prompt and the answers to it with a chat template, and marks the tokens to train on.

Every trained assistant turn ends in a token at which sampling stops: the template's end-of-turn token if it writes one,
else the tokenizer's EOS. The tokens before the first trained turn are exactly those from which sampling starts.

Some templates render a turn differently once other turns follow (they drop a think block, or close the turn with
another token), or open a think block for sampling that is missing in a finished turn. Then each turn is trained in the
form that it has as the last turn, after the tokens from which sampling it would start. This is called the training form
of the template.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.chat import ChatTemplate, Refused
from rlhf_fast.data.special import TextEncoder
from rlhf_fast.data.turns import Turn, Wrong

OPENING_TAG = re.compile(r"\s*(<[^<>/\s][^<>]*>|\[[^\[\]/\s][^\[\]]*\])\n?")
CLOSING_TAG = re.compile(r"</[^<>]*>|\[/[^\[\]]*\]|<\|[^<>|]*\|>")


@dataclass(frozen=True, slots=True)
class Encoded:
    """``input_ids`` and ``response_mask`` of the same length: 1 on every token of a trained assistant turn, including
    its end-of-turn token. The ids end with the last such token. ``prompt_length``: the number of ids before the first
    response token. ``rewritten``: the training form was used, so the tokens are not one rendering of the template."""

    input_ids: list[int]
    response_mask: list[int]
    prompt_length: int
    rewritten: bool = False


class TurnWriter:
    """Encodes prompts and answers with one chat template. ``arguments``: further arguments of the template (``tools``).

    ``prompt`` and ``response`` raise Wrong for turns that the template refuses or cannot write.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str | None, *, special_tokens_in_data: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, text)
        self.texts = TextEncoder(
            tokenizer, special_tokens_in_data=special_tokens_in_data, marks=self.template.role_marks
        )
        self.end = self.template.end
        self.eos = str(tokenizer.eos_token)

    def prompt(self, turns: list[Turn], arguments: dict[str, Any]) -> list[int]:
        """The prompt's tokens, including the generation prompt."""
        return self.texts.encode(self._render(self.texts.hide(turns), self.texts.hide(arguments), answer_next=True))

    def response(self, prompt: list[Turn], response: list[Turn], arguments: dict[str, Any]) -> Encoded:
        """The tokens of prompt and response. Every assistant turn of the response is marked, none of the prompt."""
        spelled = self.texts.first([prompt, response, arguments])
        hidden = self.texts.hide(prompt), self.texts.hide(response), self.texts.hide(arguments)
        weighted = any("weight" in turn for turn in response)
        if self.template.marks_assistant and spelled is None and not weighted:
            encoded = self._by_marks(*hidden)
            if encoded is not None:
                return encoded
        return self._by_turns(*hidden)

    def _render(self, turns: list[Turn], arguments: dict[str, Any], *, answer_next: bool = False) -> str:
        try:
            return self.template.render(turns, arguments, answer_next=answer_next)
        except Refused as refusal:
            raise _refused(turns, refusal) from refusal

    def _marked(
        self, turns: list[Turn], place: int, arguments: dict[str, Any], *, answer_next: bool = False
    ) -> tuple[str, int | None]:
        try:
            return self.template.render_marked(turns, place, arguments, answer_next=answer_next)
        except Refused as refusal:
            raise _refused(turns, refusal) from refusal

    # ---- templates with {% generation %} marks -----------------------------------------------------------------

    def _by_marks(self, prompt: list[Turn], response: list[Turn], arguments: dict[str, Any]) -> Encoded | None:
        """Uses the template's {% generation %} marks. Returns None if the rendering does not begin with the tokens from
        which sampling starts."""
        prompt_ids = self.texts.encode(self._render(prompt, arguments, answer_next=True))
        self._render(prompt + response, arguments)  # raises Wrong if the template refuses the turns
        ids, marks = self.template.tokens_and_marks(prompt + response, arguments)
        if ids[: len(prompt_ids)] != prompt_ids:
            return None
        mask = [int(mark) if place >= len(prompt_ids) else 0 for place, mark in enumerate(marks)]
        ends = [place for place, (this, following) in enumerate(pairwise([*mask, 0])) if this and not following]
        if not ends:
            return None
        if len(ends) != sum(turn["role"] == "assistant" for turn in response):
            ends = ends[-1:]  # several marks in one turn: only the last one is known to end a turn
        for place in reversed(ends):
            self._end_marked_turn(ids, mask, place)
        last = max(place for place, marked in enumerate(mask) if marked) + 1
        return Encoded(ids[:last], mask[:last], len(prompt_ids))

    def _end_marked_turn(self, ids: list[int], mask: list[int], place: int) -> None:
        """Marks the end-of-turn token of the turn whose last marked token is at ``place``, or inserts EOS there."""

        def blank(token: int) -> bool:
            return not str(self.tokenizer.decode([token])).strip()

        while mask[place] and blank(ids[place]):  # unmarks trailing white space inside the marks
            mask[place] = 0
            place -= 1
        if ids[place] == self.end.token:
            return
        after = place + 1
        while after < len(ids) and blank(ids[after]):
            after += 1
        if not self.end.added and after < len(ids) and ids[after] == self.end.token:
            mask[place + 1 : after + 1] = [1] * (after - place)
        else:
            ids.insert(place + 1, self.end.token)
            mask.insert(place + 1, 1)

    # ---- other templates: one turn after another ---------------------------------------------------------------

    def _by_turns(self, prompt: list[Turn], response: list[Turn], arguments: dict[str, Any]) -> Encoded:
        turns, text = prompt + response, ""
        ids: list[int] = []
        mask: list[int] = []
        prompt_length, rewritten = 0, False
        previous: int | None = None  # the previous trained turn, with which ``text`` ends
        for place in range(len(prompt), len(turns)):
            if turns[place]["role"] != "assistant" or turns[place].get("weight") == 0:
                continue
            asked, start, same_start = self._start(turns, place, previous, text, arguments)
            answer, same_answer = self._answer(turns, place, asked, arguments)
            rewritten = rewritten or not (same_start and same_answer)
            text = self._extend(ids, mask, text, start, trained=0)
            prompt_length = prompt_length or len(ids)
            text = self._extend(ids, mask, text, text + answer, trained=1)
            if ids[-1] != self.end.token:
                ids.append(self.end.token)
                mask.append(1)
                text += self.end.name
            previous = place
        return Encoded(ids, mask, prompt_length, rewritten)

    def _start(
        self, turns: list[Turn], place: int, previous: int | None, text: str, arguments: dict[str, Any]
    ) -> tuple[str, str, bool]:
        """(the text from which sampling turn ``place`` would start; the text after which the turn is trained: ``text``
        plus what the template writes between the two answers; whether they are equal, except for an added EOS)."""
        if previous is None:
            asked = self._render(turns[:place], arguments, answer_next=True)
            return asked, asked, True
        asked, end = self._marked(turns[:place], previous, arguments, answer_next=True)
        if asked.startswith(text):
            return asked, asked, True
        if end is None:
            raise _no_prefix(place)
        between = asked[end:]
        found = self.template.first_token(between)
        if found is not None and not between[: found.start()].strip():
            if found.group() == self.end.name or self.template.closes_turns(found.group()):
                between = between[found.end() :]  # ``text`` already has an end-of-turn token
        return asked, text + between, self.end.added and text.replace(self.eos, "") == asked[:end]

    def _answer(self, turns: list[Turn], place: int, asked: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        """(the text of turn ``place`` after ``asked``, including the end of the turn; whether the template writes
        exactly this after ``asked`` if the turn is the last)."""
        whole, end = self._marked(turns[: place + 1], place, arguments)
        same = commonprefix([asked, whole])
        if same != asked:  # a difference is allowed only inside the generation prompt
            before = self._render(turns[:place], arguments)
            if not same.startswith(before):
                raise _no_prefix(place)
        written = whole[len(same) :]
        if end is not None and end >= len(same):
            body, tail = written[: end - len(same)], whole[end:]
        else:
            cut = -1 if self.end.added else written.rfind(self.end.name)
            body, tail = (written, "") if cut < 0 else (written[:cut], written[cut:])
        content = turns[place]["content"]
        opening = OPENING_TAG.match(content)
        if opening is not None and asked.rstrip().endswith(opening.group(1)):
            # Both the generation prompt and the answer open the think block. Sampling continues inside it.
            said = content[opening.end() :] + self.end.text
            return said, whole.startswith(asked + said)
        if _squeezed(content) not in _squeezed(written) or not body.strip():
            after_tags = _squeezed(CLOSING_TAG.split(content)[-1])
            if end is None or not body.strip():
                raise Wrong("the chat template leaves the response out; mend it")
            if after_tags and _squeezed(body).endswith(after_tags):
                # The template drops a think block before these words. Sampling would write it, so it is trained.
                return content + self.end.text, False
        found = None if self.end.added else self.template.first_token(tail)
        ended = found is not None and found.group() == self.end.name
        return (body + tail[: found.end()] if found is not None and ended else body), same == asked

    def _extend(self, ids: list[int], mask: list[int], text: str, longer: str, *, trained: int) -> str:
        """Appends the tokens of the part of ``longer`` after ``text`` to ``ids``, the tokens of ``text``.

        If a token would span the boundary, the part is tokenised separately: generation also starts after the prompt's
        tokens and cannot merge with them.
        """
        whole = self.texts.encode(longer)
        more = whole[len(ids) :] if whole[: len(ids)] == ids else self.texts.encode(longer[len(text) :])
        ids += more
        mask += [trained] * len(more)
        return longer


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _refused(turns: list[Turn], refusal: Refused) -> Wrong:
    return Wrong(f"the chat template refuses these turns ({', '.join(turn['role'] for turn in turns)})", f": {refusal}")


def _no_prefix(place: int) -> Wrong:
    return Wrong(
        f"the chat template writes the turns before turn {place + 1} differently once that turn is added, so its "
        "tokens cannot be told apart; give a template with {% generation %} marks (--chat_template FILE)"
    )
