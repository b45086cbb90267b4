"""A data set by name: a file, a folder, a built-in demo, or a name on the Hugging Face hub."""

import glob
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import datasets
import huggingface_hub
import pyarrow.parquet  # type: ignore[import-untyped]
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from rlhf_fast.errors import UserError, nearest

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
TEXT_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")
DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_NAMES = ["demo/sft", "demo/preferences", "demo/prompts", "demo/prompts-eval"]
HUB_TIMEOUT_S = 5


def load_dataset(
    name: str, *, split: str = "train", rename: dict[str, str] | None = None, limit: int | None = None
) -> datasets.Dataset:
    """The rows of one split, with columns renamed.

    ``name`` is a file (.jsonl, .json, .csv, .parquet, each also .gz; one file is one split, ``split`` is not looked
    at); a folder with ``<split>.*``, ``<split>-*.*`` or ``*-<split>.*`` files, or with files named for no split, or
    written by ``Dataset.save_to_disk``; a built-in name (``demo/sft``, ``demo/preferences``, ``demo/prompts``,
    ``demo/prompts-eval``); or a hub name, its configuration after a colon: ``openai/gsm8k:main``.

    ``rename`` maps old column names to new ones. ``limit`` keeps the first rows alone.
    Raises UserError where nothing is there, a file is broken or empty, or a column to rename is missing.
    """
    renames = rename or {}
    if limit is not None and limit < 1:
        raise UserError(f"the limit on rows must be at least 1, got {limit}")
    dataset = _rename(_load(name, split, renames), renames, name)
    if len(dataset) == 0:
        raise UserError(f"{name}: no rows in it; expected at least one")
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _load(name: str, split: str, renames: dict[str, str]) -> datasets.Dataset:
    if name.startswith("demo/") and not Path(name).exists():
        if name not in DEMO_NAMES:
            raise UserError(f"{name}: no such built-in data set{nearest(name, DEMO_NAMES)}; there are {DEMO_NAMES}")
        return _load_file(DEMO_FOLDER / f"{name.removeprefix('demo/')}.jsonl", renames)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, split, renames)
    if path.is_file():
        return _load_file(path, renames)
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


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _load_file(path: Path, renames: dict[str, str]) -> datasets.Dataset:
    reader = _reader(path)
    if reader is None:
        raise UserError(f"{path}: expected a file ending in {', '.join(READERS)}, each also with .gz")
    try:
        if reader != "parquet":
            _check_text(path)
        return _read(path, reader, renames)
    except UserError:
        raise
    except Exception as error:  # pyarrow, pandas, gzip and datasets each raise their own; the reason is passed on
        raise UserError(f"{path}: {_reason(path, reader, error)}") from error


def _check_text(path: Path) -> None:
    """Arrow reads JSON without looking at the encoding, and fails rows later with no name to them."""
    empty = True
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            empty = empty and not line.strip()
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    if empty:
        raise UserError(f"{path}: the file is empty; expected at least one row")


def _read(path: Path, reader: str, renames: dict[str, str]) -> datasets.Dataset:
    if reader == "parquet" and path.suffix.lower() == ".gz":  # datasets reads gzip for text formats alone
        with _open(path) as file:
            return datasets.Dataset(pyarrow.parquet.read_table(file))
    options: dict[str, Any] = {}
    if reader == "csv":  # else "42" turns into a number and the answer "None" into a missing one
        texts = {*TEXT_COLUMNS, *(old for old, new in renames.items() if new in TEXT_COLUMNS)}
        options = {"converters": dict.fromkeys(sorted(texts), str), "keep_default_na": False}
    with _quiet():
        return datasets.load_dataset(reader, data_files=glob.escape(str(path)), split="train", **options)


def _reason(path: Path, reader: str, error: BaseException) -> str:
    if isinstance(error, gzip.BadGzipFile | EOFError):
        return f"not a whole gzip file ({error}); download or compress it again"
    if reader == "json" and (fault := _broken_json(path)):
        return fault
    while error.__cause__ is not None:
        error = error.__cause__
    return f"cannot be read as {reader} ({type(error).__name__}: {_one_line(error)})"


def _broken_json(path: Path) -> str | None:
    """The first fault of a JSON file, its line named; None where Python's own parser finds none."""
    with _open(path) as file:
        content = file.read()
    if path.name.lower().removesuffix(".gz").endswith(".json") and content.lstrip().startswith(b"["):
        documents = [(1, content)]
    else:
        documents = list(enumerate(content.split(b"\n"), start=1))
    for number, document in documents:
        if not document.strip():
            continue
        try:
            value = json.loads(document)
        except json.JSONDecodeError as error:
            line = number + error.lineno - 1
            return f"line {line}: broken JSON ({error.msg} at column {error.colno}); mend that line"
        for row in value if isinstance(value, list) and len(documents) == 1 else [value]:
            if not isinstance(row, dict):
                return f"line {number}: expected a JSON object (columns and values), got {type(row).__name__}"
    return None


def _load_folder(folder: Path, split: str, renames: dict[str, str]) -> datasets.Dataset:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.Dataset):
            return saved
        if split not in saved:
            raise UserError(f"{folder}: no split {split!r}{nearest(split, list(saved))}; there are {list(saved)}")
        return saved[split]
    found = sorted(path for path in folder.iterdir() if path.is_file() and _reader(path))
    if not found:
        raise UserError(f"{folder}: no data file in this folder; expected {', '.join(READERS)}, each also with .gz")
    files = [path for path in found if _is_split(path, split)]
    if not files:
        others = [path.name for path in found if any(_is_split(path, other) for other in SPLIT_NAMES)]
        if others:  # another split's rows under this one's name would be a silent leak
            raise UserError(f"{folder}: no file for split {split!r}; it has {', '.join(others)}: name one of them")
        files = found
    parts = [_load_file(path, renames) for path in files]
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{folder}: the columns of {names} differ ({_one_line(error)}); name one file") from error


def _is_split(path: Path, split: str) -> bool:
    stem = path.name.split(".")[0]
    return stem == split or stem.startswith(f"{split}-") or stem.endswith(f"-{split}")


def _load_hub(name: str, split: str) -> datasets.Dataset:
    repository, _, config = name.partition(":")
    unreachable: Exception | None = None
    try:
        # Asked first because datasets itself retries an unreachable hub for half a minute.
        huggingface_hub.HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise UserError(f"{name}: a gated data set; ask for access on its page, then run `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "no such file, folder or public hub data set"
        raise UserError(f"{name}: {reason}{_neighbours(Path(name))}") from error
    except Exception as error:  # DNS, proxy, TLS, time-out, offline mode, a server fault: all mean "use the cache"
        unreachable = error
    try:
        with _quiet(), _offline(unreachable is not None):
            return datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:
        if unreachable is not None and isinstance(error, ConnectionError):
            raise UserError(
                f"{name}: not a file or folder here, not in the local cache, and the hub can't be reached "
                f"({_one_line(unreachable)})"
            ) from unreachable
        raise UserError(f"{name}, split {split!r}: {_one_line(error)}") from error


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """datasets reads HF_HUB_OFFLINE once, at import; this sets what it read, for one load."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines from datasets: what goes wrong is told once, by our error."""
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


def _rename(dataset: datasets.Dataset, renames: dict[str, str], name: str) -> datasets.Dataset:
    columns = dataset.column_names
    for old, new in renames.items():
        if old not in columns:
            raise UserError(f"{name}: no column {old!r} to rename{nearest(old, columns)}; its columns are {columns}")
        if new in columns and new not in renames:
            raise UserError(f"{name}: cannot rename {old!r} to {new!r}: that column is there already; rename it too")
    return dataset.rename_columns(renames) if renames else dataset
