"""Encodes text such that special tokens come only from the chat template, never from the text of a data set or user.

Before a text goes through a template, each special token in it is replaced by a stand-in, which templates treat like
any other text. When the rendered text is encoded, the stand-in becomes the ordinary tokens of the replaced text.
"""

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

# Unicode noncharacters, which are reserved for internal use. If the data has them, they are replaced too.
STAND_IN = re.compile("\ufdd0([0-9]+)\ufdd1")
MARK = "\ufdd2"  # appended to a turn's content, to find its end in the rendered text
OWN = ("\ufdd0", "\ufdd1", MARK)


class TextEncoder:
    """Encodes text with one tokenizer.

    ``names``: the tokens that text of the data must not become: the tokenizer's special tokens and ``marks``. Empty
    with ``special_tokens_in_data``.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, special_tokens_in_data: bool = False, marks: Iterable[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {""}
        control = set() if special_tokens_in_data else special | set(marks)
        self.names = sorted(control, key=lambda name: (-len(name), name))
        self._hidden = [*self.names, *OWN]
        self._name = re.compile("|".join(map(re.escape, self.names)) or r"(?!)")
        self._any = re.compile("|".join(map(re.escape, self._hidden)))
        self._places = {name: place for place, name in enumerate(self._hidden)}
        whole, inside = tokenizer("a")["input_ids"], self._ids("a")
        starts = range(len(whole) - len(inside) + 1)
        start = next((place for place in starts if whole[place : place + len(inside)] == inside), 0)
        self._before, self._after = list(whole[:start]), len(whole) - start - len(inside)
        self._begins_with_space = str(tokenizer.convert_ids_to_tokens(inside)[0]).startswith("\u2581")

    def first(self, value: Any) -> str | None:
        """The first special token in a text, or in a text inside lists and mappings."""
        if isinstance(value, str):
            match = self._name.search(value)
            return match.group() if match else None
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return next((found for item in items if (found := self.first(item)) is not None), None)

    def hide(self, value: Any) -> Any:
        """The same text, lists and mappings with stand-ins instead of special tokens."""
        if isinstance(value, str):
            return self._any.sub(lambda found: f"\ufdd0{self._places[found.group()]}\ufdd1", value)
        if isinstance(value, dict):
            return {key: self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, which may contain stand-ins, without the tokenizer's BOS and EOS."""
        if "\ufdd0" not in text:
            return self._ids(text)
        ids: list[int] = []
        for place, piece in enumerate(STAND_IN.split(text)):
            if place % 2:
                ids += self._plain(self._hidden[int(piece)], inside=bool(ids))
            elif piece:
                ids += self._piece(piece, inside=bool(ids))
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Like ``encode``, with the tokens that the tokenizer adds before a text (BOS), without those after it."""
        if "\ufdd0" in text:
            return self._before + self.encode(text)
        ids = list(self._tokenizer(text)["input_ids"])
        return ids[: len(ids) - self._after]

    def _ids(self, text: str, **options: Any) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, **options)["input_ids"])

    def _plain(self, name: str, *, inside: bool) -> list[int]:
        """The ordinary tokens for the text of a special token."""
        ids = self._piece(name, inside=inside, split_special_tokens=True)
        if self._tokenizer.convert_tokens_to_ids(name) not in ids:
            return ids
        return self._piece(name[0], inside=inside) + self._piece(name[1:], inside=True)  # split prevents the token

    def _piece(self, text: str, *, inside: bool, **options: Any) -> list[int]:
        """The tokens of a part of a text. SentencePiece adds a space before a text; ``inside`` a text it must not."""
        if inside and self._begins_with_space:
            for anchor in ("\n", ".", "a"):
                before, whole = self._ids(anchor, **options), self._ids(anchor + text, **options)
                if whole[: len(before)] == before:
                    return whole[len(before) :]
        return self._ids(text, **options)
