"""Loads a data set by name: a file, a folder, a built-in demo, or a name on the Hugging Face hub."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import datasets
import huggingface_hub
import pyarrow.parquet  # type: ignore[import-untyped]

from rlhf_fast.data.rows import Rows, join, open_file, read_csv, read_json
from rlhf_fast.errors import UserError, nearest
from rlhf_fast.hub import reached

RowsOrDataset: TypeAlias = Rows | datasets.Dataset

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
    return _load_hub(name, split)


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
            return _read_parquet(path)
        return read_json(path, strict=strict) if reader == "json" else read_csv(path, strict=strict)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({_one_line(error)}); download or compress it again") from error


def _read_parquet(path: Path) -> datasets.Dataset:
    with _arrow_faults(path, "parquet"):
        if path.suffix.lower() == ".gz":  # datasets supports gzip only for text formats
            with open_file(path) as file:
                return _checked(datasets.Dataset(pyarrow.parquet.read_table(file)), path)
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise UserError(f"{path}: no rows in it; expected at least one")
        with _quiet():
            loaded = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        return _checked(loaded, path)


def _checked(dataset: datasets.Dataset, path: Path) -> datasets.Dataset:
    """The data set with plain Python values, without decoding images and sounds. Text that is not UTF-8 raises an error
    here; later errors would not name the file."""
    if len(dataset) == 0:
        raise UserError(f"{path}: no rows in it; expected at least one")
    dataset.data.table.validate(full=True)
    dataset = dataset.with_format(None)
    for name, kind in dataset.features.items():
        if isinstance(kind, datasets.Image | datasets.Audio):
            dataset = dataset.cast_column(name, type(kind)(decode=False))
    return dataset


@contextmanager
def _arrow_faults(path: Path, reader: str) -> Iterator[None]:
    try:
        yield
    except (UserError, gzip.BadGzipFile, EOFError, zlib.error):
        raise
    except Exception as error:  # pyarrow and datasets have many exception types
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"{path}: cannot be read as {reader} ({type(cause).__name__}: {_one_line(cause)})") from error


def _load_folder(folder: Path, split: str, strict: bool) -> RowsOrDataset:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        with _arrow_faults(folder, "a data set of save_to_disk"):
            state = folder / "state.json"
            if state.exists() and not json.loads(state.read_bytes())["_data_files"]:
                raise UserError(f"{folder}: no rows in it; expected at least one")
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.Dataset):
                if split not in saved:
                    raise UserError(
                        f"{folder}: no split {split!r}{nearest(split, list(saved))}; there are {list(saved)}"
                    )
                saved = saved[split]
            return _checked(saved, folder)
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
        return join(texts) if texts else datasets.concatenate_datasets(tables)
    except ValueError as error:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{folder}: the columns of {names} differ ({_one_line(error)}); name one file") from error


def _is_split(path: Path, split: str) -> bool:
    stem = path.name.split(".")[0]
    return stem == split or stem.startswith(f"{split}-") or stem.endswith(f"-{split}")


def _load_hub(name: str, split: str) -> datasets.Dataset:
    repository, _, config = name.partition(":")
    ask, unknown = huggingface_hub.HfApi().dataset_info, "no such file, folder or public hub data set"
    message = f"{name}: {unknown}{_neighbours(Path(name))}"
    with reached(repository, ask, kind="data set", unknown=message, flags=(datasets.config,)) as unreachable, _quiet():
        try:
            return datasets.load_dataset(repository, config or None, split=split)
        except Exception as error:
            if unreachable is not None and isinstance(error, ConnectionError):
                raise UserError(
                    f"{name}: not a file or folder here, not in the local cache, and the hub can't be reached "
                    f"({_one_line(unreachable)})"
                ) from unreachable
            raise UserError(f"{name}, split {split!r}: {_one_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, datasets prints no progress bars and no log lines; errors are reported once, as UserError."""
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _rename(dataset: RowsOrDataset, renames: dict[str, str], name: str) -> RowsOrDataset:
    columns = dataset.column_names
    for old, new in renames.items():
        if old not in columns:
            raise UserError(f"{name}: no column {old!r} to rename{nearest(old, columns)}; its columns are {columns}")
        if new in columns and new not in renames:
            raise UserError(f"{name}: cannot rename {old!r} to {new!r}: that column is there already; rename it too")
    return dataset.rename_columns(renames) if renames else dataset
