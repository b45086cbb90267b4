"""Rows of a text file as the file has them: text stays text, whatever it looks like.

Arrow and pandas guess a type for each column, so that a date becomes a timestamp and ``042`` the number 42. These
readers guess nothing: a CSV field is text, a JSON value is what JSON says it is. They cannot crash on what they read.
"""

import csv
import gzip
import json
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
MAX_DEPTH = 100  # lists and objects inside one another
JSON_NAMES = {type(None): "null", bool: "true or false", str: "text", int: "a number", float: "a number"}


@dataclass(frozen=True, slots=True)
class Fault:
    """A line, or an item of a JSON array, that could not be read. ``number`` counts ``unit`` from 1."""

    number: int
    reason: str
    detail: str = ""
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


@dataclass
class Rows(Sequence[Row]):
    """Rows in the order of the file. A row that lacks a column has None there.

    ``lines``: where each row begins in its file, from 1; empty where that is not known. ``faults``: lines left out.
    """

    rows: list[Row]
    column_names: list[str]
    lines: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

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
        return Rows([self.rows[place] for place in indices], self.column_names, lines, self.faults)

    def rename_columns(self, renames: dict[str, str]) -> "Rows":
        rows = [{renames.get(name, name): value for name, value in row.items()} for row in self.rows]
        return Rows(rows, [renames.get(name, name) for name in self.column_names], self.lines, self.faults)


def join(parts: Sequence[Rows]) -> Rows:
    """Several files as one. Line numbers would be ambiguous and are left out."""
    names = list(dict.fromkeys(chain.from_iterable(part.column_names for part in parts)))
    faults = list(chain.from_iterable(part.faults for part in parts))
    return Rows(list(chain.from_iterable(part.rows for part in parts)), names, [], faults)


def open_file(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def read_json(path: Path, *, strict: bool = False) -> Rows:
    """One JSON object a line or, where the file begins with ``[``, an array of objects; also one object alone.

    Raises UserError for an empty file and for one of which more than MAX_UNREADABLE cannot be read (``strict``: any).
    """
    with open_file(path) as file:
        beginning = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if beginning == b"[":
        return _array(path, strict)
    lines = _Lines(path, strict)
    with open_file(path) as file:
        for number, line in _numbered(file):
            lines.add(number, partial(_json_line, line))
    if lines.faults and not lines.rows and (whole := _one_object(path)) is not None:
        return Rows([whole], list(whole), [1])
    return lines.finished()


def read_csv(path: Path, *, strict: bool = False) -> Rows:
    """Comma-separated fields under a header, each as text (RFC 4180). A row with another number of fields than the
    header is a fault: a comma outside quotes would shift its columns.

    Raises UserError for an empty file, bytes that are not UTF-8, a header that names a column twice, an unclosed quote,
    and for a file of which more than MAX_UNREADABLE cannot be read (``strict``: any).
    """
    csv.field_size_limit(sys.maxsize)
    texts = _csv_lines(path)
    reader = csv.reader(texts)
    header = next((fields for fields in reader if any(fields)), None)
    if header is None:
        raise UserError(f"{path}: the file is empty; expected at least one row")
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"{path}, line {reader.line_num}: the header names the column {twice!r} twice; rename one of them"
        )
    lines = _Lines(path, strict, names)
    start, end = 0, reader.line_num  # of the latest record, in lines
    try:
        for fields in reader:
            start, end = end, reader.line_num
            if fields:
                lines.add(start + 1, partial(_csv_row, names, fields))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: cannot be read as CSV ({error})") from error
    _check_closed(path, start, texts[start:end])
    return lines.finished()


def _csv_lines(path: Path) -> list[str]:
    with open_file(path) as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    if b"\n" not in content:  # the line ends of old Macs
        content = content.replace(b"\r", b"\n")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    return [line + "\n" for line in text.removesuffix("\n").split("\n")]


class _Unreadable(Exception):
    """Why a line cannot be read; ``detail`` is what differs from line to line."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class _Lines:
    """Collects rows and faults of one file, and refuses it where the faults are too many."""

    def __init__(self, path: Path, strict: bool, names: Sequence[str] = (), unit: str = "line") -> None:
        self._path, self._strict, self._unit = path, strict, unit
        self.rows: list[Row] = []
        self.numbers: list[int] = []
        self.faults: list[Fault] = []
        self._names = dict.fromkeys(names)

    def add(self, number: int, read: Callable[[], Row]) -> None:
        try:
            row = read()
        except _Unreadable as error:
            self.faults.append(Fault(number, error.reason, error.detail, self._unit))
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
        return Rows(self.rows, list(self._names), self.numbers, self.faults)


def _numbered(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, blank ones left out; a line over MAX_LINE comes in pieces that are no JSON."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _json_line(line: bytes) -> Row:
    try:
        return _json_object(line.decode())
    except UnicodeDecodeError as error:
        raise _Unreadable(f"not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _json_object(text: str) -> Row:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise _Unreadable("broken JSON", f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise _Unreadable(f"JSON nested over {MAX_DEPTH} deep") from error
    except ValueError as error:  # an integer of thousands of digits
        raise _Unreadable("a number that cannot be read", str(error)) from error
    return _checked(value, text)


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Unreadable("a JSON object with a key twice", repr(twice))
    return row


def _checked(value: Any, text: str) -> Row:
    """``value`` where it is an object of bounded depth, all of whose text can be encoded."""
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


def _array(path: Path, strict: bool) -> Rows:
    """A JSON array of objects. Its rows are known by their number, not by a line."""
    with open_file(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" in text.strip():  # lines that are arrays
            first = text.lstrip().split("\n", 1)[0]
            raise UserError(f"{path}: line 1: expected a JSON object, got a list: {first[:60]}") from error
        detail = f"broken JSON ({error.msg} at column {error.colno}); mend that line"
        raise UserError(f"{path}: line {error.lineno}: {detail}") from error
    except (RecursionError, ValueError) as error:
        reason = "JSON nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path}: cannot be read as JSON: {reason}") from error
    if not values:
        raise UserError(f"{path}: no rows in it; expected at least one row")
    lines = _Lines(path, strict, unit="row")
    for number, value in enumerate(values, start=1):
        lines.add(number, partial(_checked, value, json.dumps(value)))
    rows = lines.finished()
    rows.lines = []
    return rows


def _one_object(path: Path) -> Row | None:
    """A file that is one JSON object over several lines; None where it is not."""
    with open_file(path) as file:
        try:
            return _json_object(file.read().decode("utf-8-sig"))
        except (_Unreadable, UnicodeDecodeError):
            return None


def _csv_row(names: list[str], fields: list[str]) -> Row:
    if len(fields) != len(names):
        count = f"{len(fields)} field{'s' if len(fields) > 1 else ''} where the header has {len(names)}"
        advice = "put text that holds a comma or a line break in double quotes"
        raise _Unreadable(f"another number of fields than the header; {advice}", count)
    return dict(zip(names, fields, strict=True))


def _check_closed(path: Path, start: int, record: list[str]) -> None:
    """A quote that is never closed takes the rest of the file into one field of the last record."""
    try:
        list(csv.reader([line.rstrip("\r\n") if line is record[-1] else line for line in record], strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise UserError(
                f"{path}, line {start + 1}: a double quote is opened there and never closed; close it"
            ) from error
