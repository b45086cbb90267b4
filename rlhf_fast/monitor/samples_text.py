"""A sample as text for the terminal. Prompts and responses are data: they go into rich's Text objects, never into
markup, and what a terminal would act on is shown as escapes."""

import sys
from collections.abc import Callable, Mapping

from rich.text import Text

from rlhf_fast.monitor.numbers import format_number, format_value, number
from rlhf_fast.monitor.samples import SFT_STEP, Order, Row, Samples
from rlhf_fast.monitor.terminal import Terminal
from rlhf_fast.monitor.texts import level
from rlhf_fast.monitor.words import joined, word_diff
from rlhf_fast.text import one_line, printable, unread_allowed

REMOVED, ADDED = "red", "green"
LABEL = "bold cyan"
# What the tokens of a response can be shaded by: key -> title, and whether the value has a sign.
SHADES = {"token_kl": "KL", "token_advantage": "advantage"}
POSITIVE = ("", "on #1d3a57", "on #1f5f8f underline", "bold #ffffff on #1668a8 underline")
NEGATIVE = ("", "on #57331d", "on #8f4a1f underline", "bold #ffffff on #a8500f underline")
NAMED_TOKENS = 5  # tokens whose values are written out


def heading(row: Row) -> Text:
    """One line: where the sample comes from, and its figures."""
    parts = [f"step {row['step']}"] if "step" in row else []
    parts += [str(row["split"])] if row.get("split") else []
    parts += [f"prompt {row['index']}"] if row.get("index") is not None else []
    for key, name in (("score", "score"), ("gold", "gold"), ("kl", "KL"), ("advantage", "advantage")):
        parts += [f"{name} {figure(row, key)}"] if number(row.get(key)) is not None else []
    parts += [f"{figure(row, 'length')} tokens"] if number(row.get("length")) is not None else []
    parts += [] if row.get("stopped") is None else ["ended" if row["stopped"] else "not ended"]
    parts += [str(row["why"]).replace("_", " ")] if row.get("why") else []
    return Text(one_line("  ".join(parts)), style="bold")


def figure(row: Row, key: str) -> str:
    value = number(row.get(key))
    return "–" if value is None else format_number(value, 3)


def body(row: Row, other: Row | None, *, at: int, diff: bool, shade: str | None = None) -> Text:
    """Prompt and response, the response as a diff or with shaded tokens.

    Args:
        other: the response at step ``at`` to the same prompt.
        diff: mark what differs from ``other``.
        shade: the key of ``SHADES`` by which tokens are shaded; where the row has no such values the response is plain.
    """
    whose = "SFT model" if at == SFT_STEP else f"policy at step {at}"
    parts = [Text("Prompt", style=LABEL), Text(printable(str(row.get("prompt", ""))))]
    if diff and other is not None:
        score = f", score {figure(other, 'score')}" if number(other.get("score")) is not None else ""
        title = Text.assemble(
            (f"Response, beside the {whose}'s{score}  ", LABEL), _removed("only there"), " ", _added("only here")
        )
        parts += [Text(), title, diff_text(str(other.get("response", "")), row["response"])]
    elif shade and shaded_values(row, shade):
        parts += [Text(), *shaded(row, shade)]
    else:
        absent = f" (no response of the {whose} to this prompt)" if diff else ""
        absent = f" (no {SHADES[shade]} of its tokens in the log)" if shade and not diff else absent
        parts += [Text(), Text.assemble(("Response", LABEL), (absent, "dim")), Text(printable(row["response"]))]
    if isinstance(row.get("extra"), Mapping):
        cells = "  ".join(f"{name} {format_value(value)}" for name, value in row["extra"].items())
        parts += [Text(), Text.assemble(("Columns  ", LABEL), one_line(cells))]
    return Text("\n").join(parts)


def diff_text(old: str, new: str) -> Text:
    """``new``, with words that only ``old`` has as ``[-words-]`` and words that only ``new`` has as ``{+words+}``."""
    text, last = Text(), "="
    for kind, part in word_diff(old, new):
        space, words = map(printable, joined(part))
        text.append(space or (" " if last == "-" and text else ""))
        text.append(words if kind == "=" or not words else _removed(words) if kind == "-" else _added(words))
        last = kind
    return text


def _removed(words: str) -> Text:
    return Text.assemble(("[-", REMOVED), (words, f"{REMOVED} strike"), ("-]", REMOVED))


def _added(words: str) -> Text:
    return Text.assemble(("{+", ADDED), (words, f"{ADDED} underline"), ("+}", ADDED))


def shaded_values(row: Row, key: str) -> list[float] | None:
    """The row's values under ``key``, one a token, gaps as 0; None where they do not fit its tokens."""
    tokens, values = row.get("tokens"), row.get(key)
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values) or not tokens:
        return None
    return [number(value) or 0.0 for value in values]


def shaded(row: Row, key: str) -> list[Text]:
    """The largest values in words; and the tokens, brighter (underlined, bold) by the level of their values."""
    values = shaded_values(row, key) or []
    text = Text()
    for token, value in zip(row["tokens"], values, strict=True):
        text.append(printable(str(token)), (POSITIVE if value >= 0 else NEGATIVE)[abs(level(value))])
    ranked = sorted(range(len(values)), key=lambda place: -abs(values[place]))[:NAMED_TOKENS]
    named = "  ".join(
        f"{one_line(repr(row['tokens'][place]), 30)} {values[place]:+.3g}" for place in ranked if values[place]
    )
    return [Text.assemble((f"Response, shaded by {SHADES[key]}", LABEL), f"  largest {named}"), text]


def print_samples(samples: Samples, order: Order, *, diff: bool, limit: int) -> None:
    """The first ``limit`` samples in ``order``, on standard output."""
    places = samples.sorted(order)
    shown = places[:limit]
    count = (
        f"{len(places)} samples" if len(shown) == len(places) else f"{len(shown)} of {len(places)} samples (--limit)"
    )
    with unread_allowed(sys.stdout):
        console = Terminal()
        console.print(Text(f"{count}, {order.words}"), soft_wrap=True)
        for place in shown:
            row = samples.rows[place]
            key = next((key for key in SHADES if shaded_values(row, key)), None) if not diff else None
            text = body(row, samples.others[place], at=samples.at, diff=diff, shade=key)
            console.print(Text("\n").join([Text(), heading(row), text]), soft_wrap=True)


def first_words(row: Row) -> str:
    return one_line(row["response"].strip(), 200).replace("\t", " ")


# title and cell of each column of the list
COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("step", lambda row: str(row.get("step", "–"))),
    ("score", lambda row: figure(row, "score")),
    ("KL", lambda row: figure(row, "kl")),
    ("length", lambda row: figure(row, "length")),
    ("ended", lambda row: "–" if row.get("stopped") is None else "yes" if row["stopped"] else "no"),
    ("response", first_words),
]
