"""The table of the Triton kernels in docs/roofline.md: which forms of a kernel it has, and what holds it.

``compile_ahead.py --roofline`` makes it anew. A prediction: no GPU takes part.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "machine_code"))
import roofline_page
import sass
from limits import GPUS, HEAD, bytes_moved, row, share

TABLE = "triton"
RENEW = "python tests/kernels/compile_ahead.py --roofline renews the table"
H100 = next(gpu for gpu in GPUS if gpu.name == "H100")
# Shares of a copy's speed on an H100: what every row reaches at least, and those that do not, with what stops them.
LEAST = 1.0
LIMITED = {
    # four sums over a tile of 4 numbers a thread, each with shuffles and a barrier
    "`masked_whiten`, `_measure`": 0.85,
}
# Kernels of a row, of a mask alone or of a few parts, whose time is that of a launch.
LEFT_OUT = (
    "._finish", "._prepare", ".add_kl", "._add_moments", "._add_statistics", "._add_parts", "._check_bounds",
    "._count_live", "exact_kl._normalise", "linear_policy_loss._normalise", "linear_policy_ref._normalise",
)  # fmt: skip
# Kernel -> the forms that it has in the table: a name, and what their arguments are. Of several that match, the slowest
# counts; a form counts for the first that it matches.
BY_DTYPE = {"bf16": r"\*bf16", "float32": ""}
WEIGHTED = {"bf16": r"\*bf16.* weight=\*", "float32": r"weight=\*"}
SILU = {"silu, bf16": r"\*bf16.* ACTIVATION=0", "silu, float32": "ACTIVATION=0"}
OF_TOKENS = "ratios=None .*lengths=None"
FORMS = {
    "gae._measure": {"": ""},
    "gae._sweep": {
        "packed sequences": r"cu_seqlens=\*",
        "long sequences": r"block_rates=\*",
        "short sequences": "",
    },
    "gated_activation._differentiate": SILU,
    "gated_activation._multiply": SILU,
    "gradients.write_segments": {
        "bf16": r" logits=\*bf16 .*ref_logits=None",
        "bf16, two rows": r" logits=\*bf16",
        "float32": r"ref_logits=None .*grad=\*fp32",
        "float32, two rows": r"grad=\*fp32",
        "float32 to bf16": "ref_logits=None",
        "float32 to bf16, two rows": "",
    },
    "masked_whiten._measure": {"": ""},
    "masked_whiten._measure_backward": {"": ""},
    "masked_whiten._whiten": {"": "MEASURE=False"},
    "masked_whiten._whiten_backward": {"": r"parts=\*"},
    "ppo_loss._evaluate": {
        "policy": f" values=None .*{OF_TOKENS}",
        "value": f" logprobs=None .*{OF_TOKENS}",
        "policy and value": f"entropy=None .*{OF_TOKENS}",
        "policy, value, KL and entropy": OF_TOKENS,
        "policy and value, by the sequence": r" logprobs=\*.* values=\*.* entropy=None .*lengths=\*",
    },
    "ppo_loss._scale": {"": ""},
    "ppo_loss._sequence_ratio": {"": "TILE=1024"},
    "rms_norm._differentiate": WEIGHTED,
    "rms_norm._normalise": WEIGHTED,
    "rotary_embedding._turn": {
        "bf16": r" x=\*bf16 .*cos=\*bf16 .*BACKWARD=False",
        "float32": r" x=\*fp32 .*BACKWARD=False",
    },
    "token_kl._sweep": {"k3": "grad_kl=None .*ESTIMATOR=2", "k3 backward": r"grad_kl=\*fp32 .*ESTIMATOR=2"},
}
# Kernels that store one result a program, or a few; their bytes are those that they load.
REDUCES = {
    "extras._sum_segments", "gae._measure", "masked_whiten._measure", "masked_whiten._measure_backward",
    "pairs.sum_terms", "ppo_loss._sequence_ratio", "rms_norm._sum_rows", "sums.sum_segments",
}  # fmt: skip
# What sass.path is told of rows whose path is not one over all stores of the kernel. Of a loop one round counts. Packed
# sequences are read 4 bytes at a time, and their bounds 8. rms_norm's second loop is there several times.
ROUND: dict[str, Any] = {"walks": True}
USUAL: dict[str, dict[str, Any]] = {
    "`extras`, `_sum_segments`": ROUND,
    "`gae`, `_sweep`, packed sequences": {"walks": True, "load": 4},
    "`gradients`, `write_segments`": ROUND,
    "`pairs`, `sum_terms`": ROUND,
    "`ppo_loss`, `_sequence_ratio`": ROUND,
    "`rms_norm`, `_normalise`": {},
    "`rms_norm`, `_sum_rows`": ROUND,
    "`sums`, `sum_segments`": ROUND,
}
# Kernels that load more than they read from memory: a row for the second time, a weight that all rows share, the angles
# of a token for all its heads. Of each number that they store, they read so many from memory.
READ_FOR_EACH_STORED = {"rms_norm._normalise": 1, "rms_norm._differentiate": 2, "rotary_embedding._turn": 1}

Report = dict[str, Any]


def row_of(kernel: str, form: str, wide: bool) -> str | None:
    """The row of the table to which a form of a kernel belongs. None: it is left out."""
    packed = "cu_seqlens=*" in form  # packed sequences begin anywhere: no load is wide
    if kernel.endswith(LEFT_OUT) or "*fp16" in form or "softcap=fp32" in form or not (wide or packed):
        return None
    names = (name for name, words in FORMS.get(kernel, BY_DTYPE).items() if re.search(words, f" {form} "))
    name = next(names, None)
    module, function = kernel.split(".")
    return None if name is None else f"`{module}`, `{function}`" + (f", {name}" if name else "")


def path(kernel: str, row: str, code: list[tuple[int, sass.Instruction]]) -> Report:
    """The figures of a thread of a kernel."""
    copies = [step.name for _, step in code if step.name.startswith(("LDGSTS", "UBLKCP", "UTMA"))]
    assert not copies, f"{kernel}: {copies[0]} loads without waiting, which sass.path does not follow"
    options = next((options for name, options in USUAL.items() if row.startswith(name)), {"stores": None})
    found = sass.path(code, **options)
    assert found is not None, f"{kernel} loads or stores nothing"
    report = found._asdict()
    if kernel in REDUCES:
        report["stored"] = 0
    if kernel in READ_FOR_EACH_STORED:
        report["loaded"] = report["stored"] * READ_FOR_EACH_STORED[kernel]
        report["flight"] = min(report["flight"], report["loaded"])
    return report


def slowest(reports: list[Report], architecture: str) -> dict[str, Report]:
    """Of each row of the table the form that is slowest on the first GPU of the architecture."""
    gpu = next(gpu for gpu in GPUS if gpu.architecture == architecture)
    in_table = [report for report in reports if report["row"] is not None]
    # what comes later in a dict stays
    return {report["row"]: report for report in sorted(in_table, key=lambda report: share(report, gpu), reverse=True)}


def renew(reports: dict[str, list[Report]]) -> None:
    """Writes the table. ``reports``: of each target."""
    slow = {target.removeprefix("sm_"): slowest(of, target.removeprefix("sm_")) for target, of in reports.items()}
    lines = [row(name, {architecture: of[name] for architecture, of in slow.items()}) for name in sorted(slow["90"])]
    version = next(iter(slow["90"].values()))["triton"]
    roofline_page.renew(TABLE, "\n".join([f"Compiled by Triton {version}.", "", HEAD, *lines]))


def breaches(reports: list[Report]) -> list[str]:
    """What the reports of an H100 have against the committed table and against LEAST, a line each.

    Another version of Triton than the table's makes other code, which is held to LEAST alone.
    """
    found = slowest(reports, H100.architecture)
    committed = {cells["kernel"]: cells for cells in roofline_page.rows(TABLE)}
    lines = [f"{name}: {RENEW}" for name in sorted(set(committed) ^ set(found))]
    for name, report in found.items():
        value, limit = share(report, H100)
        least = LIMITED.get(name, LEAST)
        if value < least:
            lines.append(f"{name}: {value:.0%} of a copy's speed on an H100 ({limit}), expected at least {least:.0%}")
        if name in committed and f"Triton {report['triton']}." in roofline_page.read(TABLE):
            lines += _changes(name, report, committed[name])
    return lines


def _changes(name: str, report: Report, cells: dict[str, str]) -> list[str]:
    moved, before = bytes_moved(report), cells["bytes a thread"]
    least, most = int(cells["in flight"]), int(cells["instructions"]) * 9 // 8
    lines = [f"{name}: {moved} bytes a thread, {before} in the table; {RENEW}"] if moved != before else []
    if report["flight"] < least:
        lines.append(f"{name}: {report['flight']} bytes in flight, expected at least {least}")
    if report["instructions"] > most:
        lines.append(f"{name}: {report['instructions']} instructions, expected at most {most}")
    return lines
