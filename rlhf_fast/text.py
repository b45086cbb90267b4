"""Text from outside (file names, samples, other people's exceptions) made fit to show, and lines printed so that a
terminal or a pipe that has gone away ends no run."""

import contextlib
import os
import re
import reprlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

# Control characters but newline and tab, marks that turn the direction of text, line separators, half characters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
LONGEST_LINE, LONGEST_VALUE, LONGEST_TRACEBACK = 2000, 200, 50_000


def printable(text: str) -> str:
    r"""``text`` with what a terminal or a browser would act on in place of showing it as escapes: ``\x1b``, ``\u202e``.

    Newlines and tabs stay.
    """
    return HIDDEN.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """``printable`` on one line, cut to ``longest`` characters."""
    line = re.sub(r"[ \t\r]*\n\s*", " ", text.strip("\r\n"))
    return printable(line if len(line) <= longest else f"{line[:longest]} ...")


class _Short(reprlib.Repr):
    """repr of the first items of the first levels alone: what YAML aliases make of a few bytes has no end."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxtuple = 3, 8, 8, 8
        self.maxstring = self.maxlong = self.maxother = LONGEST_VALUE

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python writes no number of more than 4300 digits
            return f"a number of {x.bit_length()} bits"


def shown(value: Any) -> str:
    """A value as error messages show it: its repr, at most 200 characters of it."""
    text = printable(_Short().repr(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} ..."


def traceback_text(error: BaseException) -> str:
    """Its traceback, ``printable``; of one longer than LONGEST_TRACEBACK characters the middle is left out."""
    text = "".join(traceback.format_exception(error)).rstrip()
    half = LONGEST_TRACEBACK // 2
    if len(text) > LONGEST_TRACEBACK:
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
    return printable(text)


def tell(text: str, file: TextIO | None = None) -> None:
    """Prints ``text``, made printable, as a line on standard error or on ``file``."""
    stream = sys.stderr if file is None else file
    with unread_allowed(stream):
        print(printable(text), file=stream, flush=True)


@contextlib.contextmanager
def unread_allowed(stream: TextIO | None) -> Iterator[None]:
    """Inside, a write to ``stream`` may fail since nobody reads it any more: a closed pipe, a terminal that hung up.

    What is written to it afterwards goes nowhere; the work itself goes on.
    """
    try:
        yield
    except OSError:
        _to_nowhere(stream)
    except ValueError as error:
        if "closed file" not in str(error):
            raise


def _to_nowhere(stream: TextIO | None) -> None:
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):  # no real file under it: then there is nothing to redirect
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def safe_streams() -> None:
    """For a process of our own: standard streams that are closed lead nowhere, and no character ends a run because the
    terminal's encoding lacks it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # as long as the process lives
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
