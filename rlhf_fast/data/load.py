"""Loads a data set by name: a file, a folder, a built-in demo, or a name on the Hugging Face hub."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rlhf_fast.data.rows import Rows, join, read_csv, read_json
from rlhf_fast.errors import UserError, nearest
from rlhf_fast.text import one_line

if TYPE_CHECKING:
    import datasets

RowsOrDataset: TypeAlias = "Rows | datasets.Dataset"

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
FORMAT_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")
DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_NAMES = ["demo/sft", "demo/preferences", "demo/prompts", "demo/prompts-eval"]


def load_dataset(
    name: str,
    *,
    split: str = "train",
    rename: dict[str, str] | None = None,
    limit: int | None = None,
    strict: bool = False,
) -> RowsOrDataset:
    """The rows of one split, with columns renamed.

    ``name`` is one of:

    - a file (.jsonl, .json, .csv, .parquet, each also .gz), for which ``split`` is ignored;
    - a folder with ``<split>.*``, ``<split>-*.*`` or ``*-<split>.*`` files, or with files not named after a split, or
      written by ``Dataset.save_to_disk``;
    - a built-in name (``demo/sft``, ``demo/preferences``, ``demo/prompts``, ``demo/prompts-eval``);
    - a hub name, with a configuration after a colon: ``openai/gsm8k:main``.

    Types are not guessed: a CSV field is text, a JSON value has its JSON type, a Parquet value its column's type. Lines
    that cannot be read are left out and listed in ``faults`` of the returned Rows.

    ``rename`` maps old column names to new ones. ``limit`` keeps only the first rows.
    Raises UserError if nothing is found, a file is broken or empty, more than a tenth of its lines cannot be read
    (``strict``: any), or a column to rename is missing.
    """
    renames = rename or {}
    if limit is not None and limit < 1:
        raise UserError(f"the limit on rows must be at least 1, got {limit}")
    try:
        dataset = _rename(_load(name, split, strict), renames, name)
    except OSError as error:  # no permission, a name too long, a disk that fails
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error
    if len(dataset) == 0:
        raise UserError(f"{name}: no rows in it; expected at least one")
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _load(name: str, split: str, strict: bool) -> RowsOrDataset:
    if name.startswith("demo/") and not Path(name).exists():
        if name not in DEMO_NAMES:
            raise UserError(f"{name}: no such built-in data set{nearest(name, DEMO_NAMES)}; there are {DEMO_NAMES}")
        return _load_file(DEMO_FOLDER / f"{name.removeprefix('demo/')}.jsonl", strict)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _load_folder(path, split, strict)
    if path.is_file():
        return _load_file(path, strict)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{name}: a link to {os.readlink(path)}, which is not there")
    if _reader(path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such file or folder{_neighbours(path)}")
    from rlhf_fast.data import arrow

    return arrow.load_hub(name, split, _neighbours(path))


def _reader(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} is not there either"
    entries = [entry for entry in sorted(path.parent.iterdir()) if not entry.name.startswith(".")]
    files = [entry.name for entry in entries if _reader(entry)]
    listed = f"; {path.parent} holds {', '.join(files[:8])}" if files else f"; {path.parent} holds no data file"
    return nearest(path.name, files + [entry.name for entry in entries if entry.is_dir()]) or listed


def _load_file(path: Path, strict: bool) -> RowsOrDataset:
    reader = _reader(path)
    if reader is None:
        raise UserError(f"{path}: expected a file ending in {', '.join(READERS)}, each also with .gz")
    try:
        if reader == "parquet":
            from rlhf_fast.data import arrow

            return arrow.read_parquet(path)
        return read_json(path, strict=strict) if reader == "json" else read_csv(path, strict=strict)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: not a whole gzip file ({one_line(str(error))}); download or compress it again"
        ) from error


def _load_folder(folder: Path, split: str, strict: bool) -> RowsOrDataset:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        from rlhf_fast.data import arrow

        return arrow.read_saved(folder, split)
    found = sorted(path for path in folder.iterdir() if path.is_file() and _reader(path) and path.name[0] != ".")
    if not found:
        raise UserError(f"{folder}: no data file in this folder; expected {', '.join(READERS)}, each also with .gz")
    files = [path for path in found if _is_split(path, split)]
    if not files:
        others = [path.name for path in found if any(_is_split(path, other) for other in SPLIT_NAMES)]
        if others:  # loading another split's rows would silently leak held-out data
            raise UserError(f"{folder}: no file for split {split!r}; it has {', '.join(others)}: name one of them")
        files = found
    return _join([_load_file(path, strict) for path in files], files, folder)


def _join(parts: list[RowsOrDataset], files: list[Path], folder: Path) -> RowsOrDataset:
    if len(parts) == 1:
        return parts[0]
    formats = {tuple(name for name in FORMAT_COLUMNS if name in part.column_names) for part in parts}
    texts = [part for part in parts if isinstance(part, Rows)]
    tables = [part for part in parts if not isinstance(part, Rows)]
    try:
        if len(formats) > 1:
            raise ValueError(" and ".join(str(list(names)) for names in sorted(formats)))
        if texts and tables:
            raise ValueError("text and Parquet")
        if texts:
            return join(texts)
        from rlhf_fast.data import arrow

        return arrow.concatenate(tables)
    except ValueError as error:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{folder}: the columns of {names} differ ({one_line(str(error))}); name one file") from error


def _is_split(path: Path, split: str) -> bool:
    stem = path.name.split(".")[0]
    return stem == split or stem.startswith(f"{split}-") or stem.endswith(f"-{split}")


def _rename(dataset: RowsOrDataset, renames: dict[str, str], name: str) -> RowsOrDataset:
    columns = dataset.column_names
    for old, new in renames.items():
        if old not in columns:
            raise UserError(f"{name}: no column {old!r} to rename{nearest(old, columns)}; its columns are {columns}")
        if new in columns and new not in renames:
            raise UserError(f"{name}: cannot rename {old!r} to {new!r}: that column is there already; rename it too")
    return dataset.rename_columns(renames) if renames else dataset
