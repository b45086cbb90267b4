"""What a run writes: strict JSON and UTF-8, in files that a killed run or a full disk never leaves half-written."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError


def jsonable(value: Any) -> Any:
    """``value`` with every non-finite float replaced by None: NaN and Infinity are not JSON."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)  # numpy and torch scalars too; anything else is a TypeError here, not later
    return number if math.isfinite(number) else None


def to_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """One strict JSON text; characters outside ASCII stay readable."""
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, indent=indent, sort_keys=sort_keys)


def encode(text: str) -> bytes:
    """UTF-8. A lone surrogate (half a character from a tokenizer) becomes ``\\udXXX``, its JSON escape as well."""
    return text.encode("utf-8", errors="backslashreplace")


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: a reader sees the old file or the new one, never a part.

    Raises:
        UserError: the folder cannot be written or the disk is full; the old file is then still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(encode(text))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # the error that counts is the first one
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The one-line error for a failed write."""
    return UserError(
        f"could not write {path}: {error.strerror or error}; what was written before is still there. "
        "Free disk space or fix the folder's permissions, then resume the run"
    )
