"""A Triton kernel that has become slower by its machine code is named, with its row in docs/roofline.md."""

from pathlib import Path
from typing import Any

import pytest
from triton_roofline import LIMITED, breaches, renew, roofline_page, row_of

REPORT: dict[str, Any] = {
    "kernel": "gae._measure", "row": "`gae`, `_measure`", "triton": "3.9.0", "registers": 32, "shared": 32,
    "threads": 128, "instructions": 280, "alu": 90, "special": 0, "loaded": 64, "stored": 0, "flight": 72,
}  # fmt: skip


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    page = tmp_path / "roofline.md"
    page.write_text("Before.\n\n<!-- triton -->\n<!-- end -->\n\nAfter.\n")
    monkeypatch.setattr(roofline_page, "PAGE", page)
    renew({target: [REPORT] for target in ("sm_80", "sm_90", "sm_100")})
    return page


def test_the_table_is_written_and_held(page: Path) -> None:
    assert page.read_text().startswith("Before.\n\n<!-- triton -->\nCompiled by Triton 3.9.0.\n\n| kernel |")
    assert "| `gae`, `_measure` | 64 | 72 | 280 | 100% (" in page.read_text() and page.read_text().endswith("After.\n")
    assert breaches([REPORT]) == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"flight": 68}, "68 bytes in flight, expected at least 72"),
        ({"instructions": 316}, "316 instructions, expected at most 315"),
        ({"loaded": 32}, "32 bytes a thread, 64 in the table; python tests/kernels/compile_ahead.py --roofline"),
        ({"alu": 400, "triton": "3.6.0"}, "89% of a copy's speed on an H100 (alu), expected at least 100%"),
    ],
)
def test_what_has_become_slower_is_named(page: Path, changed: dict[str, Any], line: str) -> None:
    (found,) = breaches([REPORT | changed])
    assert found.startswith(f"`gae`, `_measure`: {line}")


def test_another_triton_is_held_to_the_limits_alone(page: Path) -> None:
    assert breaches([REPORT | {"triton": "3.6.0", "instructions": 400}]) == []


def test_of_several_forms_the_slowest_counts(page: Path) -> None:
    assert breaches([REPORT, REPORT | {"instructions": 400}, REPORT]) == breaches([REPORT | {"instructions": 400}])


def test_kernels_that_come_and_go_are_named(page: Path) -> None:
    (gone, new) = breaches([REPORT | {"row": "`gae`, `_new`"}])
    assert gone.startswith("`gae`, `_measure`: ") and new.startswith("`gae`, `_new`: ")


def test_forms_that_matter_have_a_row() -> None:
    assert row_of("sums.sum_segments", "softcap=None logits=*bf16", wide=True) == "`sums`, `sum_segments`, bf16"
    assert row_of("sums.sum_segments", "softcap=None logits=*bf16", wide=False) is None
    assert row_of("sums.sum_segments", "softcap=fp32 logits=*bf16", wide=True) is None
    assert row_of("sums.sum_segments", "softcap=None logits=*fp16", wide=True) is None
    assert row_of("masked_logprobs._finish", "logits=*bf16", wide=True) is None
    assert row_of("gae._sweep", "cu_seqlens=*i64 block_rates=None", wide=False) == "`gae`, `_sweep`, packed sequences"


# 1024 tokens of 256 threads, 1024 numbers or 2048 columns of 128: what the docstring of the kernel says of each.
@pytest.mark.parametrize(
    ("row", "moved"),
    [
        ("`token_kl`, `_sweep`, k3", f"{4 * 8} + {4 * 4}"),
        ("`token_kl`, `_sweep`, k3 backward", f"{4 * 12} + {4 * 4}"),
        ("`ppo_loss`, `_evaluate`, policy, value, KL and entropy", f"{4 * 4 * 8} + {4 * 4 * 3}"),
        ("`gae`, `_sweep`, packed sequences", f"{8 * 8} + {8 * 8}"),
        ("`gated_activation`, `_differentiate`, silu, bf16", f"{8 * 3 * 2} + {8 * 2 * 2}"),
        ("`rms_norm`, `_differentiate`, float32", f"{8 * 2 * 4} + {8 * 4}"),
        ("`sums`, `sum_segments`, bf16", f"{16 * 2}"),
        ("`gradients`, `write_segments`, float32", f"{16 * 4} + {16 * 4}"),
    ],
)
def test_the_bytes_are_those_of_the_docstring(row: str, moved: str) -> None:
    (cells,) = (cells for cells in roofline_page.rows("triton") if cells["kernel"] == row)
    assert cells["bytes a thread"] == moved


def test_limits_are_of_rows_of_the_table() -> None:
    assert set(LIMITED) <= {cells["kernel"] for cells in roofline_page.rows("triton")}
