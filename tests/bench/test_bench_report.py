"""Tables and chart from synthetic results."""

import copy
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.bench import chart, report


def entry(ms: float, ours: float, **rest: Any) -> dict[str, Any]:
    return {"ms": ms, "spread_ms": ms / 10, "rounds": 5, "times_ours": ms / ours, "extra_mb": 0.5, "error": {}, **rest}


RESULTS: dict[str, Any] = {
    "machine": {
        "cpu": "Some CPU",
        "cores": 2,
        "gpu": None,
        "versions": {"torch": "2.13.0", "trl": None, "liger-kernel": "0.8"},
    },
    "device": "cpu",
    "quick": False,
    "rows": [
        {
            "op": "gae",
            "name": "gae, 64 x 1024",
            "backend": "native",
            "ceiling": "a plain copy",
            "contestants": {
                "rlhf-fast": entry(0.0625, 0.0625, gb_per_s=16.0, error={"advantages": 2e-7, "returns": 1e-7}),
                "torch eager": entry(0.5, 0.0625, gb_per_s=2.0, extra_mb=806.0),
                "torch.compile": entry(1.25, 0.0625, gb_per_s=1.0),
                "Liger": entry(1250.0, 0.0625, gb_per_s=0.1, extra_mb=None),
                "rlhf-fast, fp32": entry(0.125, 0.0625),
                "a plain copy": entry(0.03125, 0.0625, gb_per_s=32.0),
            },
            "missing": {"TRL": "not installed: pip install trl"},
            "marks": [
                {"mark": "at least 5x as fast as torch eager", "bound": 5, "value": 8.0, "met": True},
                {"mark": "at most 1x the time of a plain copy", "bound": 1, "value": 2.0, "met": False},
                {"mark": "at least 6x as fast as TRL", "bound": 6, "value": None, "met": None},
            ],
        }
    ],
}


def test_the_summary_has_a_line_a_workload_and_a_mark() -> None:
    where, work, marks = report.summary(RESULTS).split("\n\n")
    assert where.startswith("2 cores of Some CPU; torch 2.13.0, liger-kernel 0.8.") and "Quick" not in where
    assert work.splitlines()[0].count("|") == 9
    assert work.splitlines()[2] == (
        "| `gae`, 64 x 1024 | 62.5 us | 500 us (8.00x) | 1.25 ms (20x) | Liger 1,250 ms (20000x)<br>"
        "rlhf-fast, fp32 125 us (2.00x) | 50% of a plain copy | 0.5 MB<br>torch eager 806 MB | 2e-07 |"
    )
    assert marks.splitlines()[2:] == [
        "| `gae`, 64 x 1024 | at least 5x as fast as torch eager | 8, met |",
        "|  | at most 1x the time of a plain copy | 2, MISSED |",
        "|  | at least 6x as fast as TRL | not measured |",
    ]


def test_details_have_every_contestant_and_who_is_missing() -> None:
    text = report.details(RESULTS)
    assert "### gae, 64 x 1024 (native)" in text
    assert "| rlhf-fast | 62.5 us | ± 6.25 us |  | 16 GB/s | 50% | 0.5 MB | 2e-07 |" in text
    assert "| Liger | 1,250 ms | ± 125 ms | 20000x | 0.1 GB/s | 0% |  |  |" in text
    assert "| a plain copy | 31.2 us | ± 3.12 us | 0.50x | 32 GB/s |  | 0.5 MB |  |" in text
    assert "- TRL: not installed: pip install trl" in text
    assert "- at most 1x the time of a plain copy: 2, MISSED" in text


def test_the_terminal_gets_the_same() -> None:
    text = report.lines(RESULTS["rows"][0])
    assert text.startswith("gae, 64 x 1024  (backend: native)\n")
    for part in (
        "62.5 us",
        "not installed: pip install trl",
        "mark: at least 5x as fast as torch eager: 8, met",
        "MISSED",
    ):
        assert part in text


def on_gpu() -> dict[str, Any]:
    results = copy.deepcopy(RESULTS)
    results["machine"] |= {"gpu": "Some GPU", "versions": {"torch": "2.11", "triton": "3.6", "trl": None}}
    results |= {
        "device": "cuda",
        "ceilings": {"copy_gb_per_s": 3000.4, "bf16_product_tflop_per_s": 700.0},
        "failed": {"token_kl, k3": "RuntimeError: no"},
        "pending": ["gae, 1 x 2", "gae, 2 x 2"],
    }
    for name, figures in results["rows"][0]["contestants"].items():
        figures |= {"host_us": 12.5, "first_calls_s": 1.25, "not_captured": "it waits" if name == "Liger" else None}
    return results


def test_on_a_gpu_the_host_and_what_was_not_captured_are_told() -> None:
    text = report.lines(on_gpu()["rows"][0])
    assert "  Liger: timed as it is called, gaps between launches included: it waits\n" in text
    assert "  host time of a call: rlhf-fast 12.5 us, torch eager 12.5 us" in text
    assert "  our first calls, compiling included: 1.2 s" in text
    assert "- Liger: timed as it is called" in report.details(on_gpu())
    assert "host time" not in report.lines(RESULTS["rows"][0])


def test_the_verdict_leaves_no_workload_out() -> None:
    assert report.verdict(on_gpu()).splitlines() == [
        "Some GPU; torch 2.11, triton 3.6; at best it copies 3,000 GB/s and multiplies bf16 matrices at 700 TFLOP/s. "
        "Medians of runs in turn; (2x) is twice our time.",
        f"{'gae, 64 x 1024':<90}   62.5 us  50% of a plain copy",
        "    at least 5x as fast as torch eager: 8, met",
        "    at most 1x the time of a plain copy: 2, MISSED",
        "    at least 6x as fast as TRL: not measured",
        "token_kl, k3: FAILED: RuntimeError: no",
        "gae, 1 x 2: not reached",
        "gae, 2 x 2: not reached",
        "workloads: 1 measured, 1 failed, 2 not reached; marks: 1 met, 1 MISSED, 1 not measured",
    ]


def test_quick_sizes_are_said_to_be() -> None:
    assert "Quick sizes" in report.summary({**RESULTS, "quick": True})


def test_the_chart_compares_with_plain_torch() -> None:
    bars = [("rlhf-fast", 8.0), ("torch.compile", 0.4), ("Liger", 0.0004)]
    assert chart.groups(RESULTS) == [("gae, 64 x 1024", bars)]
    loop = copy.deepcopy(RESULTS)
    entries = loop["rows"][0]["contestants"]
    entries["a Python loop"] = entries.pop("torch eager")
    assert chart.groups(loop) == [("gae, 64 x 1024", bars)]
    del entries["a Python loop"]
    assert chart.groups(loop) == []


@pytest.mark.parametrize("rows", [RESULTS["rows"], []])
def test_the_chart_is_a_png(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    chart.draw({**RESULTS, "rows": rows}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
