"""What `rlhf-fast bench` measured on a GPU, beside what docs/roofline.md predicts for it.

    python tests/cuda/measured.py bench/results/gpu-*.json

Both are shares of a plain copy's speed. The prediction is that of the slowest and of the fastest of the operation's
kernels; launches and tails are in the measurement alone.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "machine_code"))
from limits import GPUS
from roofline_page import rows

# The operations whose kernels are those of another.
KERNELS_OF = {"clipped_policy_loss": "ppo_loss", "clipped_value_loss": "ppo_loss"}


def predictions(gpu: str) -> dict[str, list[tuple[float, str]]]:
    """Operation -> (share, limit) of each of its CUDA kernels; empty for a GPU that the page does not have."""
    column = next((each.name for each in GPUS if re.search(rf"\b{each.name}\b", gpu)), None)
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows("roofline") if column is not None else ():
        share, limit = re.fullmatch(r"(\d+)%(?: \(.*x)?, (\w+)\)?", row[column]).groups()
        found.setdefault(row["kernel"].split("`")[1], []).append((int(share) / 100, limit))
    return found


def beside(measured: dict[str, Any]) -> list[str]:
    gpu = measured["gpu"]["name"]
    predicted = predictions(gpu)
    lines = [f"{gpu}: share of a plain copy's speed" + ("" if predicted else "; no prediction for this GPU")]
    for row in measured["rows"]:
        ours, copy = row["contestants"]["rlhf-fast"], row["contestants"].get("a plain copy", {})
        if "gb_per_s" not in ours or "gb_per_s" not in copy:
            continue
        line = f"{row['name']:<80} measured {ours['gb_per_s'] / copy['gb_per_s']:5.0%}"
        if kernels := predicted.get(KERNELS_OF.get(row["op"], row["op"])):
            (slowest, limit), (fastest, _) = min(kernels), max(kernels)
            line += f"   predicted {slowest:4.0%} ({limit}) to {fastest:4.0%}"
        lines.append(line)
    return lines


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print("\n".join(beside(json.loads(Path(file).read_text()))))
    if not sys.argv[1:]:
        print("nothing was measured")
