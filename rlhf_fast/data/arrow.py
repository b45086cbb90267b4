"""What datasets and pyarrow read: Parquet, ``save_to_disk`` and the hub. Text files do not need them, so ``load``
imports this module, and with it their memory, only where it is used."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet  # type: ignore[import-untyped]

from rlhf_fast.data.rows import open_file
from rlhf_fast.errors import UserError, nearest
from rlhf_fast.hub import reached


def read_parquet(path: Path) -> datasets.Dataset:
    with _arrow_faults(path, "parquet"):
        if path.suffix.lower() == ".gz":  # datasets supports gzip only for text formats
            with open_file(path) as file:
                return _checked(datasets.Dataset(pyarrow.parquet.read_table(file)), path)
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise UserError(f"{path}: no rows in it; expected at least one")
        with _quiet():
            loaded = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        return _checked(loaded, path)


def read_saved(folder: Path, split: str) -> datasets.Dataset:
    """What ``save_to_disk`` wrote."""
    with _arrow_faults(folder, "a data set of save_to_disk"):
        state = folder / "state.json"
        if state.exists() and not json.loads(state.read_bytes())["_data_files"]:
            raise UserError(f"{folder}: no rows in it; expected at least one")
        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, datasets.Dataset):
            if split not in saved:
                raise UserError(f"{folder}: no split {split!r}{nearest(split, list(saved))}; there are {list(saved)}")
            saved = saved[split]
        return _checked(saved, folder)


def concatenate(tables: list[datasets.Dataset]) -> datasets.Dataset:
    """Raises ValueError if their columns differ."""
    return datasets.concatenate_datasets(tables)


def load_hub(name: str, split: str, beside: str) -> datasets.Dataset:
    """``beside``: what the message says of similar names here if the hub has none of this name."""
    repository, _, config = name.partition(":")
    ask, unknown = huggingface_hub.HfApi().dataset_info, "no such file, folder or public hub data set"
    message = f"{name}: {unknown}{beside}"
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
