"""What the file says is what the row holds, and what cannot be read is named with its line."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_fast.data.load import load_dataset
from rlhf_fast.data.rows import MAX_DEPTH
from rlhf_fast.errors import UserError


def read(tmp_path: Path, name: str, content: str | bytes, **options: Any) -> Any:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_dataset(str(path), **options)


def refusal(tmp_path: Path, name: str, content: str | bytes, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, content, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LOOKS_LIKE_A_TYPE = [
    "2024-01-01", "2024-01-01T10:00:00Z", "12:30", "042", "1e5", "NaN", "nan", "None", "null", "true", "-", "", " x ",
    "123456789012345678901234567890", "1_000", "0x1f", "\u2028", "1,5",
]  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_stays_text_whatever_it_looks_like(tmp_path: Path, name: str):
    rows = [{"prompt": "q", "answer": text} for text in LOOKS_LIKE_A_TYPE]
    if name.endswith("csv"):
        content = "prompt,answer\n" + "".join(f'q,"{row["answer"]}"\n' for row in rows)
    else:
        content = json.dumps(rows) if name.endswith("json") else "".join(json.dumps(row) + "\n" for row in rows)
    assert list(read(tmp_path, name, content)) == rows


def test_csv_fields_are_text_in_every_column(tmp_path: Path):
    loaded = read(tmp_path, "zeros.csv", "prompt,answer,level,margin\nsix times seven,042,3,0.5\nten,10,,1\n")
    assert [loaded["answer"], loaded["level"], loaded["margin"]] == [["042", "10"], ["3", ""], ["0.5", "1"]]


def test_json_values_are_what_json_says(tmp_path: Path):
    row = {"prompt": "q", "big": 2**80, "whole": 1, "real": 1.0, "no": False, "nothing": None, "deep": {"a": [1, "1"]}}
    (loaded,) = read(tmp_path, "a.jsonl", json.dumps(row))
    assert loaded == row
    assert [type(value) for value in loaded.values()] == [type(value) for value in row.values()]


def test_columns_of_several_types_and_late_columns(tmp_path: Path):
    content = '{"prompt": "a", "x": 1}\n{"prompt": "b", "x": "1"}\n{"prompt": "c", "x": [1], "late": {"k": 1}}\n'
    loaded = read(tmp_path, "a.jsonl", content)
    assert loaded.column_names == ["prompt", "x", "late"]
    assert [row["x"] for row in loaded] == [1, "1", [1]]
    assert loaded["late"] == [None, None, {"k": 1}]


def test_csv_quotes_commas_line_breaks_and_line_ends(tmp_path: Path):
    content = '\ufeffprompt,completion\r\n"a, ""b""","one\n\ntwo"\r\n\r\nc,d\r\n'
    loaded = read(tmp_path, "a.csv", content)
    assert list(loaded) == [{"prompt": 'a, "b"', "completion": "one\n\ntwo"}, {"prompt": "c", "completion": "d"}]
    assert loaded.lines == [2, 6]
    assert list(read(tmp_path, "mac.csv", "a,b\rc,d\r")) == [{"a": "c", "b": "d"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prompt,completion\nHello, friend,Hi\nDear, you,Bye\n", "line 2: more fields than the header; .*3 where the "),
        ('prompt,completion\n"he said \\"hi\\" ok",b\n', "line 2: text goes on after a closing double quote"),
        ('prompt,completion\n"a,b\nc,d\n', "line 2: a double quote is opened there and never closed"),
        ("prompt,answer,answer\na,b,c\n", "line 1: the header names the column 'answer' twice; rename one of them"),
        ("prompt,completion\n", "no rows in it; expected at least one row"),
        ("\n\n", "the file is empty"),
    ],
)
def test_csv_that_would_shift_or_lose_columns_is_refused(tmp_path: Path, content: str, expected: str):
    assert re.search(expected, refusal(tmp_path, "a.csv", content))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("null", "line 1: expected a JSON object (columns and values), got null"),
        ("null\n{}\n", "line 1: expected a JSON object (columns and values), got null"),
        ("true\n", "got true or false"),
        ('"text"\n', "got text"),
        ('{"prompt": "q", "x": ' + "[" * 100_000, "line 1: JSON nested over 100 deep"),
        ('{"prompt": "q", "x": ' + "[" * 10_000 + "]" * 10_000 + "}", "line 1: JSON nested over 100 deep"),
        ('{"prompt": "q", "x": ' + "[" * 900 + "]" * 900 + "}", "line 1: JSON nested over 100 deep"),
        ('{"x": ' + "9" * 5000 + "}", "line 1: a number of more than 4300 digits"),
        ('{"prompt": "a", "prompt": "b"}', "line 1: a JSON object with a key twice ('prompt')"),
        ('{"a": 1}\n{"a": "x \\ud83d y"}\n', "line 2: half of a surrogate pair"),
        ('{"a": 1}\n{"a": {"b": ["\\uDE00"]}}\n', "line 2: half of a surrogate pair"),
        (b'{"a": "\xed\xa0\x80"}\n', "line 1: not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_that_cannot_be_a_row_is_named_and_crashes_nothing(
    tmp_path: Path, content: str | bytes, expected: str, suffix: str
):
    text = refusal(tmp_path, f"a{suffix}", content)
    assert expected in text
    assert len(text) < 600


def test_an_item_of_an_array_is_known_by_its_line(tmp_path: Path):
    content = '\n\n[{"a": 1},\n\n null, 7]'
    assert "line 5: expected a JSON object (columns and values), got null" in refusal(tmp_path, "a.json", content)
    items = [*['{"a": 1}'] * 40, '{"a": 1, "a": 2}', '{"a": ' + "9" * 5000 + "}", "null"]
    loaded = read(tmp_path, "b.json", "[" + ",\n".join(items) + "]")
    assert [(fault.number, fault.reason.split(",")[0]) for fault in loaded.faults] == [
        (41, "a JSON object with a key twice"),
        (42, "a number of more than 4300 digits"),
        (43, "expected a JSON object (columns and values)"),
    ]
    for cut in ('[{"a": 1} {"a": 2}]', '[{"a": 1}'):
        assert "broken JSON (expected a comma or the end of the array" in refusal(tmp_path, "c.json", cut)


def test_objects_one_after_another(tmp_path: Path):
    assert list(read(tmp_path, "a.jsonl", '{"a": 1}{"a": 2}')) == [{"a": 1}, {"a": 2}]
    loaded = read(tmp_path, "b.json", '{\n "a": 1\n}\n{\n "a": 2\n}\n')
    assert (list(loaded), loaded.lines) == ([{"a": 1}, {"a": 2}], [1, 4])


def test_short_csv_rows_end_in_empty_fields_and_bytes_that_are_no_text_cost_one_row(tmp_path: Path):
    loaded = read(tmp_path, "a.csv", "prompt,completion,answer\na,b\nc,d,e\nf,g,h,,\n")
    assert loaded["answer"] == ["", "e", "h"]
    assert loaded.short == [2]
    loaded = read(tmp_path, "b.csv", b"a,b\n" + b"x,y\n" * 20 + b"caf\xe9,y\n")
    assert len(loaded) == 20 and loaded.faults[0].number == 22
    assert len(read(tmp_path, "c.csv", b"a,b\r\n" + b"x,y\r\n" * 20 + b"c\rd,e\r\n")) == 22


def test_a_whole_pair_of_surrogates_and_bounded_depth_are_read(tmp_path: Path):
    content = '{"a": "\\ud83d\\ude00", "b": ' + "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2) + "}"
    (row,) = read(tmp_path, "a.jsonl", content)
    assert row["a"] == "😀"


def test_a_json_array_and_one_object_over_several_lines(tmp_path: Path):
    assert list(read(tmp_path, "a.json", '[{"a": 1},\n {"a": 2}]')) == [{"a": 1}, {"a": 2}]
    assert list(read(tmp_path, "b.json", '{\n "a": 1,\n "b": 2\n}\n')) == [{"a": 1, "b": 2}]
    assert list(read(tmp_path, "c.json", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_one_line_of_many_is_left_out_and_remembered(tmp_path: Path, name: str):
    good, bad = ('{"a": "x"}', '{"a": ') if "jsonl" in name else ("x", "x,y")
    lines = [*(["a"] if name == "a.csv" else []), *[good] * 50, bad, *[good] * 49]
    content = "\n".join(lines).encode()
    loaded = read(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
    assert len(loaded) == 99
    (fault,) = loaded.faults
    assert fault.number == lines.index(bad) + 1
    assert f"line {fault.number}: " in refusal(
        tmp_path, name, gzip.compress(content) if name.endswith("gz") else content, strict=True
    )


def test_a_file_of_which_a_tenth_cannot_be_read_is_refused(tmp_path: Path):
    content = '{"a": 1}\n' * 8 + "oops\n" * 2
    assert "line 9: broken JSON" in refusal(tmp_path, "a.jsonl", content)
    assert "2 of 10 rows cannot be read" in refusal(tmp_path, "a.jsonl", content)


def test_rows_given_out_are_copies(tmp_path: Path):
    loaded = read(tmp_path, "a.jsonl", '{"a": 1}\n')
    loaded[0]["a"] = 2
    assert loaded[0] == {"a": 1}


def test_a_parquet_file_without_rows_or_with_bytes_that_are_no_text(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(UserError, match="no rows in it"):
        load_dataset(str(path))
    bad = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": bad}), path)
    with pytest.raises(UserError, match="cannot be read as parquet .*UTF8"):
        load_dataset(str(path))


def test_paths_that_cannot_be_opened(tmp_path: Path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "nowhere.jsonl")
    for name, expected in [
        (str(link), "a link to .*nowhere.jsonl, which is not there"),
        ("x" * 300 + ".jsonl", "too long"),
    ]:
        with pytest.raises(UserError, match=expected):
            load_dataset(name)
