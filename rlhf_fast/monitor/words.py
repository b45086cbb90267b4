"""What differs between two texts, word by word."""

import re
from difflib import SequenceMatcher


def word_diff(old: str, new: str) -> list[tuple[str, list[str]]]:
    """``("=", words)`` for words in both, ``("-", words)`` for those of ``old`` alone, ``("+", words)`` of ``new``.

    A word has the white space before it, which is not compared: where the words are equal, it is that of ``new``.
    """
    before, after = re.findall(r"\s*\S+|\s+$", old), re.findall(r"\s*\S+|\s+$", new)
    matcher = SequenceMatcher(None, [word.strip() for word in before], [word.strip() for word in after], autojunk=False)
    parts: list[tuple[str, list[str]]] = []
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            parts.append(("=", after[j1:j2]))
            continue
        parts += [("-", before[i1:i2])] if i2 > i1 else []
        parts += [("+", after[j1:j2])] if j2 > j1 else []
    return parts


def joined(words: list[str]) -> tuple[str, str]:
    """The white space before ``words``, and their text after it: a mark around the text leaves out the space."""
    text = "".join(words)
    return text[: len(text) - len(text.lstrip())], text.lstrip()
