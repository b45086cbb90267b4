"""Checks of the machine: backends of the operations, memory, disk, the output folder."""

import shutil
from collections import Counter
from pathlib import Path

import psutil
import torch

from rlhf_fast.config import PPOConfig
from rlhf_fast.doctor.findings import Check, Finding, error, note, ok, warning
from rlhf_fast.doctor.subject import StageData
from rlhf_fast.errors import UserError
from rlhf_fast.ops import backends as backends_of
from rlhf_fast.ops import build_info
from rlhf_fast.recipes import plan
from rlhf_fast.recipes.experience import trained_roles
from rlhf_fast.recipes.output import check_output

BYTES = 4  # of a number in checkpoints: adapters and moments are float32


def backends(device: str | None = None) -> Finding:
    """Which engine runs each operation."""
    listing, info = backends_of(device), build_info()
    chosen = Counter(str(entry["chosen"]) for entry in listing.values())
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    counts = ", ".join(f"{count} on {name}" for name, count in chosen.most_common())
    found = f"operations on {place}: {counts}; compiled engine: {info.get('cpu_path') or info.get('reason')}"
    stuck = next((op for op, entry in listing.items() if entry["chosen"] is None), None)
    if stuck is not None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in listing[stuck]["unavailable"].items())
        change = "Unset RLHF_FAST_BACKEND, or install what the reason names."
        return error(f"{found}; {stuck} cannot run ({reasons})", "The run fails at the first call.", change)
    if set(chosen) == {"torch"}:
        why = "The torch references are right, and several times slower."
        change = "Unset RLHF_FAST_BACKEND; run `make`, or `pip install .`, where there is a C++ compiler."
        return warning(found, why, change)
    return ok(found)


def memory(data: StageData) -> Finding:
    """The planned peak against this machine's memory."""
    config = data.config
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return note(
            f"the GPU has {free / 1e9:.1f} of {total / 1e9:.1f} GB free; the base's weights take "
            f"{data.shape.weights * data.shape.itemsize / 1e9:.1f} GB",
            "Memory is predicted for CPUs alone.",
            "Try --max_steps 2 with the longest rows first.",
        )
    lengths = [plan.sequence_lengths(config, row) for row in data.rows]
    parts = plan.micro_batches(config, [sum(row) for row in lengths])
    phases = plan.predict_memory(config, data.shape, lengths, parts)
    peak = max(phases, key=phases.__getitem__)
    machine = psutil.virtual_memory()
    found = (
        f"about {phases[peak] / 1e9:.1f} GB at the peak, in {peak}; {machine.available / 1e9:.1f} of "
        f"{machine.total / 1e9:.1f} GB are free"
    )
    why, change = "The run stops out of memory, or the machine swaps.", plan.advice(config, peak)
    change = f"{change[0].upper()}{change[1:]}."
    if phases[peak] > machine.total:
        return error(found, why, change)
    return warning(found, why, f"Close other programs. {change}") if phases[peak] > machine.available else ok(found)


def disk(data: StageData) -> Finding:
    """Free disk against the checkpoints and adapters of the stage."""
    config = data.config
    trained = len(trained_roles(config)) if isinstance(config, PPOConfig) else 1
    adapter = trained * data.shape.adapter * BYTES
    checkpoint = 4 * adapter  # adapters in PEFT's format, and their weights with Adam's two moments
    needed = (config.save_total_limit + 1) * checkpoint + 2 * adapter  # one more while it is written; the final ones
    folder = Path(config.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    found = (
        f"{config.save_total_limit + 1} checkpoints of {checkpoint / 1e6:.0f} MB and the adapters take "
        f"{needed / 1e9:.2f} GB; {free / 1e9:.1f} GB are free in {there}"
    )
    why, change = "A full disk stops the run at a checkpoint.", "Make room, or lower --save_total_limit or --lora_r."
    if free < needed:
        return error(found, why, change)
    return warning(found, why, change) if free < 2 * needed else ok(found)


def output_folder(data: StageData) -> Finding:
    """Whether the stage may write into its folder."""
    try:
        check_output(data.config, data.name)
    except UserError as refusal:
        return warning(str(refusal), "The run stops with this line before it begins.", "What the line says.")
    return ok(f"{data.config.output_dir} is free")


CHECKS: list[Check] = [memory, disk, output_folder]
