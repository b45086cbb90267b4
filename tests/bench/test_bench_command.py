"""`rlhf-fast bench` as a user runs it."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.bench import harness
from rlhf_fast.bench.command import BENCHES, chosen, results_name, rounded
from rlhf_fast.bench.workload import Workload
from rlhf_fast.cli import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_measures_and_writes_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, tables = tmp_path / "figures.json", tmp_path / "tables.md"
    flags = ["--quick", "--threads", "1", "--json", str(figures), "--markdown", str(tables)]
    assert main(["bench", "--only", "gae,overhead", *flags]) == 0
    assert torch.get_num_threads() == 1
    results = json.loads(figures.read_text())
    assert results["quick"] is True and results["device"] == "cpu" and results["machine"]["cores"] == 1
    assert {"torch", "trl", "liger-kernel"} <= results["machine"]["versions"].keys()
    assert [row["op"] for row in results["rows"]] == [
        "gae",
        "gae",
        "masked_logprobs",
        "token_kl",
        "clipped_policy_loss",
    ]
    padded = results["rows"][0]
    assert padded["contestants"].keys() == {"rlhf-fast", "a Python loop", "a plain copy"}
    for entry in padded["contestants"].values():
        assert entry.keys() >= {"ms", "spread_ms", "rounds", "gb_per_s", "times_ours", "extra_mb", "error"}
    assert padded["marks"][0].keys() == {"mark", "bound", "value", "met"}
    text = capsys.readouterr().out
    assert "gae, 4 x 64 packed" in text and "Quick sizes" in text and f"wrote {figures}" in text
    assert "### gae, 4 x 64 (" in tables.read_text()


def test_a_workload_that_fails_is_told_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    seen: list[list[str]] = []

    def measure(workload: Workload, device: torch.device, quick: bool) -> dict[str, Any]:
        if figures.exists():
            seen.append(json.loads(figures.read_text())["pending"])
        if "packed" in workload.title:
            raise RuntimeError("two\nlines")
        return actual(workload, device, quick)

    actual = harness.measure
    monkeypatch.setattr(harness, "measure", measure)
    assert main(["bench", "--quick", "--only", "gae,masked_whiten", "--json", str(figures)]) == 1
    results = json.loads(figures.read_text())
    assert [row["name"] for row in results["rows"]] == ["gae, 4 x 64", "masked_whiten, 8 x 64"]
    assert results["failed"] == {"gae, 4 x 64 packed": "RuntimeError: two lines"} and results["pending"] == []
    assert seen == [["gae, 4 x 64 packed", "masked_whiten, 8 x 64"], ["masked_whiten, 8 x 64"]]  # after each row
    out, err = capsys.readouterr()
    assert "gae, 4 x 64 packed: FAILED\nTraceback" in out
    assert "1 workloads failed: gae, 4 x 64 packed" in err


def test_an_interrupted_bench_keeps_its_rows_and_tells_its_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a folder: the file is named after the device."""

    def measure(workload: Workload, device: torch.device, quick: bool) -> dict[str, Any]:
        if "packed" in workload.title:
            raise KeyboardInterrupt
        return actual(workload, device, quick)

    actual = harness.measure
    monkeypatch.setattr(harness, "measure", measure)
    assert main(["bench", "--quick", "--only", "gae", "--json", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["gae, 4 x 64"] and results["pending"] == ["gae, 4 x 64 packed"]
    out = capsys.readouterr().out
    assert "gae, 4 x 64 packed: not reached\nworkloads: 1 measured, 0 failed, 1 not reached" in out


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu-h100-80gb-hbm3.json"),
        ("NVIDIA GeForce RTX 4090", "gpu-geforce-rtx-4090.json"),
        ("A/../B", "gpu-a-b.json"),
    ],
)
def test_the_results_are_named_after_the_device(monkeypatch: pytest.MonkeyPatch, device: str, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: device)
    assert results_name(torch.device("cuda")) == name and results_name(CPU) == "cpu.json"


def test_it_lists_those_of_a_gpu_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--only", "gae", "--device", "cuda"]) == 0
    assert capsys.readouterr().out.startswith("gae, 4096 x 128\n    at most 10 us\ngae, 64 x 32768\n")


def test_it_lists_workloads_and_marks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("gae, 64 x 1024") + 1] == "    at least 60x as fast as a Python loop"
    assert sum(not line.startswith(" ") for line in lines) == len(chosen(None, CPU)) > len(BENCHES)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--only gea", f"--only: there is no bench 'gea' (did you mean 'gae'?); there are {', '.join(BENCHES)}"),
        ("--only gae,", f"--only: there is no bench ''; there are {', '.join(BENCHES)}"),
        ("--device tpu", "--device must be cpu, cuda or cuda:N; got 'tpu'"),
        ("--device mps", "--device must be cpu, cuda or cuda:N; got 'mps'"),
        ("--device cuda:99", "CUDA devices here"),
        ("--threads 0", "--threads must be 1 or more; got 0"),
        ("--threads x", "argument --threads: invalid int value: 'x'"),
        ("--json nowhere/x.json", "--json must be a file in a folder that exists; got 'nowhere/x.json'"),
        ("--markdown .", "--markdown must be a file in a folder that exists; got '.'"),
        ("--chrat x.png", "unknown flag --chrat (did you mean '--chart'?); rlhf-fast bench --help lists the flags"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_measured(
    flags: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rlhf-fast: error: ") and expected in err and err.count("\n") == 1


def test_a_chart_without_matplotlib_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--chart", str(tmp_path / "x.png")]) == 2
    assert "--chart draws with matplotlib, which is not installed: pip install matplotlib" in capsys.readouterr().err


def test_figures_are_rounded_and_json_gets_no_nan() -> None:
    given = {
        "ms": 1.23456789,
        "rounds": 12345678,
        "error": [float("nan"), float("inf"), 1e-7],
        "met": True,
        "op": "gae",
    }
    assert rounded(given) == {"ms": 1.235, "rounds": 12345678, "error": [None, None, 1e-7], "met": True, "op": "gae"}
