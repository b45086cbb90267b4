"""Reads the rows of JSON and CSV files without guessing types.

Arrow and pandas guess a type for each column, so that a date becomes a timestamp and ``042`` the number 42. Here a CSV
field is text, and a JSON value has its JSON type. No file content makes these readers crash.
"""

import contextlib
import csv
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from rlhf_fast.errors import UserError

Row = dict[str, Any]

MAX_UNREADABLE = 0.1  # share of lines that cannot be read, above which the file is refused
MAX_LINE = 64 * 2**20  # bytes
MAX_DEPTH = 100  # nested lists and objects
MAX_DIGITS = 4300  # Python's limit for reading an integer
LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile("[\ud800-\udfff]")
JSON_NAMES = {type(None): "null", bool: "true or false", str: "text", int: "a number", float: "a number"}


@dataclass(frozen=True, slots=True)
class Fault:
    """A line that could not be read. ``number`` counts ``unit`` from 1: lines of a text file, rows of a table."""

    number: int
    reason: str
    detail: str = ""
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


@dataclass
class Rows(Sequence[Row]):
    """Rows in the order of the file. A missing column of a row is None.

    ``lines``: the line at which each row begins, from 1; empty if unknown. ``faults``: lines that could not be read.
    ``short``: lines of rows with fewer fields than the header.
    """

    rows: list[Row]
    column_names: list[str]
    lines: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    short: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """A row by its place, or a column by its name."""
        if isinstance(index, str):
            return [row.get(index) for row in self.rows]
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self.rows[index]
        return {name: row.get(name) for name in self.column_names}

    def __iter__(self) -> Iterator[Row]:
        return (self[place] for place in range(len(self)))

    def select(self, indices: Sequence[int]) -> "Rows":
        lines = [self.lines[place] for place in indices] if self.lines else []
        return Rows([self.rows[place] for place in indices], self.column_names, lines, self.faults, self.short)

    def rename_columns(self, renames: dict[str, str]) -> "Rows":
        rows = [{renames.get(name, name): value for name, value in row.items()} for row in self.rows]
        return Rows(rows, [renames.get(name, name) for name in self.column_names], self.lines, self.faults, self.short)


def join(parts: Sequence[Rows]) -> Rows:
    """Concatenates the rows of several files, without line numbers, which would be ambiguous."""
    names = list(dict.fromkeys(chain.from_iterable(part.column_names for part in parts)))
    faults, short = ([*chain.from_iterable(lists)] for lists in zip(*((p.faults, p.short) for p in parts), strict=True))
    return Rows(list(chain.from_iterable(part.rows for part in parts)), names, [], faults, short)


def open_file(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def read_json(path: Path, *, strict: bool = False) -> Rows:
    """Reads JSON objects: one per line, in an array, or one after another.

    Raises UserError for an empty file, or if a share of more than MAX_UNREADABLE cannot be read (``strict``: any).
    """
    with open_file(path) as file:
        beginning = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if beginning == b"[":
        return _documents(path, strict)
    lines = _Lines(path, strict)
    with open_file(path) as file:
        for number, line in _numbered(file):
            lines.add(number, partial(_json_line, line))
    if len(lines.faults) > MAX_UNREADABLE * (len(lines.rows) + len(lines.faults)):
        with contextlib.suppress(UserError):  # if this fails too, the faults of the lines are the better message
            return _documents(path, strict=True)
    return lines.finished()


def read_csv(path: Path, *, strict: bool = False) -> Rows:
    """Reads comma-separated fields with a header, each as text (RFC 4180). A row with more fields than the header is a
    fault, because an unquoted comma has shifted its columns. Missing fields at the end of a row are empty.

    Raises UserError for an empty file, a duplicate column name, an unclosed quote, or if a share of more than
    MAX_UNREADABLE cannot be read (``strict``: any).
    """
    csv.field_size_limit(sys.maxsize)
    with open_file(path) as file:
        text = file.read().removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
    texts = LINE.findall(text)  # split into lines, because the reader counts them
    reader = csv.reader(texts, strict=True)
    lines: _Lines | None = None
    names: list[str] = []
    end = 0
    while True:
        start, end = end, reader.line_num
        try:
            fields = next(reader, None)
            end = reader.line_num
            if fields is None:
                break
            if not any(fields) and (lines is None or len(fields) < 2):
                continue
            if lines is None:
                names = _csv_header(path, fields, end)
                lines = _Lines(path, strict, names)
            else:
                lines.add(start + 1, partial(_csv_row, names, fields))
                if len(fields) < len(names):
                    lines.short.append(start + 1)
        except csv.Error as error:
            end = reader.line_num
            if "unexpected end of data" in str(error):
                raise UserError(
                    f"{path}, line {start + 1}: a double quote is opened there and never closed; close it"
                ) from error
            if lines is None:
                raise UserError(f"{path}, line {end}: the header cannot be read as CSV ({error})") from error
            lines.add(start + 1, partial(_csv_fault, str(error)))
    if lines is None:
        raise UserError(f"{path}: the file is empty; expected at least one row")
    return lines.finished()


def _csv_header(path: Path, fields: list[str], line: int) -> list[str]:
    names = [name or f"Unnamed: {place}" for place, name in enumerate(fields)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}, line {line}: the header names the column {twice!r} twice; rename one of them")
    if any(SURROGATE.search(name) for name in names):
        raise UserError(f"{path}, line {line}: not UTF-8 text; save it as UTF-8")
    return names


def _csv_row(names: list[str], fields: list[str]) -> Row:
    if any(SURROGATE.search(text) for text in fields):
        raise _Unreadable("not UTF-8 text; save it as UTF-8")
    while len(fields) > len(names) and not fields[-1]:
        fields = fields[:-1]
    if len(fields) > len(names):
        advice = "put text that holds a comma or a line break in double quotes"
        raise _Unreadable(f"more fields than the header; {advice}", f"{len(fields)} where the header has {len(names)}")
    return dict(zip(names, fields + [""] * (len(names) - len(fields)), strict=True))


def _csv_fault(reason: str) -> Row:
    if "expected after" in reason:
        reason = "text goes on after a closing double quote; write a quote inside quotes as two"
    raise _Unreadable(reason)


class _Unreadable(Exception):
    """The reason why a line cannot be read; ``detail`` may differ from line to line."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class _Lines:
    """Collects the rows and faults of one file; raises UserError if there are too many faults."""

    def __init__(self, path: Path, strict: bool, names: Sequence[str] = ()) -> None:
        self._path, self._strict = path, strict
        self.rows: list[Row] = []
        self.numbers: list[int] = []
        self.faults: list[Fault] = []
        self.short: list[int] = []
        self._names = dict.fromkeys(names)

    def add(self, number: int, read: Callable[[], Row]) -> None:
        try:
            row = read()
        except _Unreadable as error:
            self.faults.append(Fault(number, error.reason, error.detail))
            return
        self._names.update(dict.fromkeys(row))
        self.rows.append(row)
        self.numbers.append(number)

    def finished(self) -> Rows:
        total = len(self.rows) + len(self.faults)
        if total == 0:
            what = "no rows in it" if self._names else "the file is empty"
            raise UserError(f"{self._path}: {what}; expected at least one row")
        if self.faults and (self._strict or len(self.faults) > MAX_UNREADABLE * total):
            more = f"; {len(self.faults)} of {total} rows cannot be read" if len(self.faults) > 1 else ""
            separator = "," if self.faults[0].reason.startswith("not UTF-8") else ":"
            raise UserError(f"{self._path}{separator} {self.faults[0]}{more}; mend {'them' if more else 'it'}")
        return Rows(self.rows, list(self._names), self.numbers, self.faults, self.short)


def _numbered(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, without blank lines. A line over MAX_LINE is split, so it is invalid JSON."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


class _Reading:
    """A decoder for one value. It records content that a row must not have, instead of failing in the middle of it."""

    def __init__(self) -> None:
        self.fault: _Unreadable | None = None
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def _object(self, pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.fault = _Unreadable("a JSON object with a key twice", repr(twice))
        return row

    def _integer(self, digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            self.fault = _Unreadable(f"a number of more than {MAX_DIGITS} digits")
            return 0
        return int(digits)


def _json_line(line: bytes) -> Row:
    reading = _Reading()
    try:
        text = line.decode()
        return _checked(reading.decoder.decode(text), text, reading)
    except UnicodeDecodeError as error:
        raise _Unreadable(f"not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise _Unreadable("broken JSON", f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise _Unreadable(f"JSON nested over {MAX_DEPTH} deep") from error


def _checked(value: Any, text: str, reading: _Reading) -> Row:
    """``value``, if it is an object of bounded depth with valid Unicode text; raises _Unreadable otherwise."""
    if reading.fault is not None:
        raise reading.fault
    if not isinstance(value, dict):
        got = JSON_NAMES.get(type(value), type(value).__name__)
        raise _Unreadable(f"expected a JSON object (columns and values), got {got}")
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise _Unreadable(f"JSON nested over {MAX_DEPTH} deep")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise _Unreadable(
                "half of a surrogate pair, which is no character; write the whole pair, or U+FFFD in its place", half
            ) from error
    return value


def _deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
    return any(isinstance(item, dict | list) for item in level)


def _documents(path: Path, strict: bool) -> Rows:
    """Reads the items of a JSON array, or JSON objects one after another; numbers each by the line where it begins."""
    with open_file(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    place = _skip(text, 0)
    array = text[place : place + 1] == "["
    place = _skip(text, place + array)
    lines, line, counted = _Lines(path, strict), 1, 0
    while place < len(text) and not (array and text[place] == "]"):
        line, counted = line + text.count("\n", counted, place), place
        reading = _Reading()
        try:
            value, end = reading.decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            fault = f"broken JSON ({error.msg} at column {error.colno}); mend that line"
            raise UserError(f"{path}: line {error.lineno}: {fault}") from error
        except RecursionError as error:
            raise UserError(f"{path}: line {line}: JSON nested over {MAX_DEPTH} deep") from error
        lines.add(line, partial(_checked, value, text[place:end], reading))
        place = _skip(text, end)
        if array and text[place : place + 1] not in (",", "]"):
            line = text.count("\n", 0, place) + 1
            expected = "a comma or the end of the array"
            raise UserError(f"{path}: line {line}: broken JSON (expected {expected} after an item); mend that line")
        if array and text[place] == ",":
            place = _skip(text, place + 1)
    if array and not lines.rows and not lines.faults:
        raise UserError(f"{path}: no rows in it; expected at least one")
    return lines.finished()


def _skip(text: str, place: int) -> int:
    found = WHITE_SPACE.match(text, place)
    return found.end() if found else place
