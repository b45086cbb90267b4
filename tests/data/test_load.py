import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from rlhf_fast.data import load
from rlhf_fast.data.load import load_dataset
from rlhf_fast.errors import UserError

ROWS = [{"prompt": "one", "completion": "1"}, {"prompt": "two", "completion": "None"}]


def write_rows(path: Path) -> Path:
    """ROWS in the format that the suffix names; gzip on top where it ends in .gz."""
    plain = path.with_name(path.name.removesuffix(".gz"))
    if plain.suffix == ".jsonl":
        plain.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(ROWS, indent=1))
    elif plain.suffix == ".csv":
        plain.write_text("prompt,completion\none,1\ntwo,None\n")
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(str(plain))
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        plain.unlink()
    return path


def message(name: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(str(name), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_files_need_no_arrow(tmp_path: Path) -> None:
    """It takes memory and time to import, and nothing else that a run imports needs it."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi"}\n')
    code = (
        "import sys; from rlhf_fast.recipes import ppo; from rlhf_fast.data import load_dataset; "
        "load_dataset(sys.argv[1]); "
        "found = {'datasets', 'pyarrow', 'pandas'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "rows.jsonl")], check=True)


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, suffix: str, gz: str):
    path = write_rows(tmp_path / f"two words{suffix}{gz}")
    assert list(load_dataset(str(path))) == ROWS
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "cache"] == [path.name], "wrote beside the data"


def test_csv_text_stays_text_when_renamed_to_a_text_column(tmp_path: Path):
    path = tmp_path / "sums.csv"
    path.write_text("question,answer,level\n1+1,2,3\n")
    loaded = load_dataset(str(path), rename={"question": "prompt", "answer": "completion"})
    assert list(loaded) == [{"prompt": "1+1", "completion": "2", "level": "3"}]


def test_limit_keeps_the_first_rows(tmp_path: Path):
    path = str(write_rows(tmp_path / "rows.jsonl"))
    assert list(load_dataset(path, limit=1)) == ROWS[:1]
    assert list(load_dataset(path, limit=99)) == ROWS
    assert "at least 1, got 0" in message(path, limit=0)


def test_rename_errors_name_the_columns(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl")
    assert "no column 'promt' to rename (did you mean 'prompt'?)" in message(path, rename={"promt": "messages"})
    assert "that column is there already" in message(path, rename={"prompt": "completion"})
    swapped = load_dataset(str(path), rename={"prompt": "completion", "completion": "prompt"})
    assert swapped[0] == {"completion": "one", "prompt": "1"}


def test_a_folder_gives_the_file_of_the_split(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl")
    (folder / "gold-test.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "held out"}\n', mtime=0))
    (folder / "README.md").write_text("not data")
    assert list(load_dataset(str(folder))) == ROWS
    assert list(load_dataset(str(folder), split="test")) == [{"prompt": "held out"}]
    text = message(folder, split="validation")
    assert "no file for split 'validation'" in text and "gold-test.jsonl.gz, train.jsonl" in text


def test_a_folder_with_files_of_no_split_gives_all_of_them(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    assert "no data file in this folder" in message(folder)
    write_rows(folder / "a.jsonl")
    write_rows(folder / "b.jsonl.gz")
    assert list(load_dataset(str(folder))) == ROWS + ROWS
    (folder / "c.jsonl").write_text('{"prompt": [{"role": "user", "content": "x"}]}\n')
    assert "the columns of a.jsonl, b.jsonl.gz, c.jsonl differ" in message(folder)


def test_a_file_name_is_not_a_pattern(tmp_path: Path):
    (tmp_path / "rows a.jsonl").write_text('{"prompt": "wrong"}\n')
    assert list(load_dataset(str(write_rows(tmp_path / "rows [ab] *.jsonl")))) == ROWS
    assert list(load_dataset(str(write_rows(tmp_path / "rows [a].jsonl")))) == ROWS


def test_hub_shards_in_a_folder_are_joined(tmp_path: Path):
    write_rows(tmp_path / "train-00000-of-00002.parquet")
    write_rows(tmp_path / "train-00001-of-00002.parquet")
    assert list(load_dataset(str(tmp_path))) == ROWS + ROWS


def test_a_folder_from_save_to_disk(tmp_path: Path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert list(load_dataset(str(tmp_path / "one"))) == ROWS
    assert list(load_dataset(str(tmp_path / "two"), split="test")) == ROWS[1:]
    assert "no split 'tets' (did you mean 'test'?)" in message(tmp_path / "two", split="tets")


def test_a_damaged_folder_from_save_to_disk_is_named(tmp_path: Path):
    def saved(name: str, dataset: datasets.Dataset) -> Path:
        dataset.save_to_disk(str(tmp_path / name))
        return tmp_path / name

    whole = datasets.Dataset.from_list(ROWS)
    arrow = next(saved("arrow", whole).glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    (saved("state", whole) / "state.json").write_text("{")
    saved("empty", whole.select([]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset_dict.json").write_text("[]")
    for name in ("arrow", "state"):
        assert f"{tmp_path / name}: cannot be read as a data set of save_to_disk" in message(tmp_path / name)
    assert str(tmp_path / "other") in message(tmp_path / "other")
    assert "no rows in it" in message(tmp_path / "empty")


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas"])
def test_a_saved_format_does_not_change_the_values(tmp_path: Path, form: str):
    rows = [{"prompt": "a", "answer": 1, "choices": ["x", "y"]}]
    datasets.Dataset.from_list(rows).with_format(form).save_to_disk(str(tmp_path / "d"))
    assert list(load_dataset(str(tmp_path / "d"))) == rows


def test_hidden_files_of_a_folder_are_no_data(tmp_path: Path):
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / ".other.json").write_text('{"a": 1}')
    assert list(load_dataset(str(tmp_path))) == ROWS


def test_builtin_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load, "DEMO_FOLDER", tmp_path)
    write_rows(tmp_path / "prompts-eval.jsonl")
    assert list(load_dataset("demo/prompts-eval")) == ROWS
    assert "did you mean 'demo/preferences'?" in message("demo/preference")


def test_a_missing_file_names_its_neighbours(tmp_path: Path):
    write_rows(tmp_path / "harmless-test.jsonl")
    assert "(did you mean 'harmless-test.jsonl'?)" in message(tmp_path / "harmles-test.jsonl")
    assert f"{tmp_path} holds harmless-test.jsonl" in message(tmp_path / "zzz.csv")
    assert f"the folder {tmp_path / 'nowhere'} is not there either" in message(tmp_path / "nowhere" / "x.csv")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bad.jsonl", b'{"a": 1}\n{"a": }\n', "bad.jsonl: line 2: broken JSON (Expecting value at column 7)"),
        ("bad.jsonl.gz", gzip.compress(b'{"a": 1}\n\n{"a\n', mtime=0), "bad.jsonl.gz: line 3: broken JSON"),
        ("bad.json", b'[{"a": 1},\n {"a": x}]', "bad.json: line 2: broken JSON"),
        ("list.jsonl", b'{"a": 1}\n[1, 2]\n', "line 2: expected a JSON object (columns and values), got list"),
        ("latin.jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}\n', "latin.jsonl, line 2: not UTF-8"),
        ("latin.csv", b"a\ncaf\xe9\n", "latin.csv, line 2: not UTF-8"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3\n", "ragged.csv: line 3: more fields than the header"),
        ("bad.parquet", b"zzz", "bad.parquet: cannot be read as parquet"),
        ("bad.parquet.gz", gzip.compress(b"zzz", mtime=0), "bad.parquet.gz: cannot be read as parquet"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "cut.jsonl.gz: not a whole gzip file"),
        ("plain.jsonl.gz", b'{"a": 1}\n', "plain.jsonl.gz: not a whole gzip file"),
        ("empty.jsonl", b"", "empty.jsonl: the file is empty"),
        ("blank.jsonl.gz", gzip.compress(b"\n \n", mtime=0), "blank.jsonl.gz: the file is empty"),
        ("header.csv", b"prompt,completion\n", "header.csv: "),
        ("none.json", b"[]", "none.json: "),
        ("notes.txt", b"hello", "notes.txt: expected a file ending in .jsonl"),
    ],
)
def test_a_broken_file_is_named_with_its_fault(tmp_path: Path, name: str, content: bytes, expected: str):
    (tmp_path / name).write_bytes(content)
    assert expected in message(tmp_path / name)


def test_nothing_is_printed_and_the_settings_of_datasets_come_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    load_dataset(str(write_rows(tmp_path / "rows.jsonl")))
    (tmp_path / "bad.parquet").write_bytes(b"zzz")
    message(tmp_path / "bad.parquet")
    assert capfd.readouterr() == ("", "")
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before


def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, name: str, *, timeout: float) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)


def test_without_the_hub_a_hub_name_fails_quickly_and_clearly(monkeypatch: pytest.MonkeyPatch):
    no_hub(monkeypatch)
    start = time.monotonic()
    text = message("someone/words:main")
    assert time.monotonic() - start < 10
    assert text == (
        "someone/words:main: not a file or folder here, not in the local cache, and the hub can't be reached "
        "(Name or service not known)"
    )
    assert datasets.config.HF_HUB_OFFLINE is False


def test_without_the_hub_the_local_cache_is_used(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    built = datasets.load_dataset("json", data_files=str(write_rows(tmp_path / "rows.jsonl")), split="train")
    cached = own_cache / "someone___words" / "default" / "0.0.0" / "0123"
    shutil.copytree(Path(built.cache_files[0]["filename"]).parent, cached)
    (cached / "json-train.arrow").rename(cached / "words-train.arrow")
    info = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": "words"}))
    no_hub(monkeypatch)
    assert list(load_dataset("someone/words")) == ROWS
    assert "Unknown split" in message("someone/words", split="test")


def test_with_the_hub_name_configuration_and_split_are_passed_on(monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []

    def answer(self: object, name: str, *, timeout: float) -> None:
        asked.append((name, timeout))

    def give(path: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", answer)
    monkeypatch.setattr(datasets, "load_dataset", give)
    assert list(load_dataset("someone/words:main", split="test", limit=1)) == ROWS[:1]
    assert asked == [("someone/words", 5), ("someone/words", "main", "test")]


def test_a_name_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch):
    def unknown(self: object, name: str, *, timeout: float) -> None:
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unknown)
    assert "someone/wrods: no such file, folder or public hub data set" in message("someone/wrods")
