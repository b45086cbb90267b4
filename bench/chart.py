"""The bar chart: speed of each contestant relative to plain torch, one group of bars per workload."""

from pathlib import Path
from typing import Any

from rlhf_fast.bench.report import times
from rlhf_fast.bench.workload import COMPILED, EAGER, LOOP, OURS

Bars = list[tuple[str, float]]
COLOURS = {OURS: "#1b6ca8", COMPILED: "#8c8c8c"}
PEERS = "#d9a441"


def groups(results: dict[str, Any]) -> list[tuple[str, Bars]]:
    """For each workload the speed of its contestants relative to plain torch; workloads without it are left out."""
    found = []
    for row in results["rows"]:
        entries = row["contestants"]
        plain = EAGER if EAGER in entries else LOOP
        if plain in entries:
            bars = [
                (name, entries[plain]["ms"] / entry["ms"])
                for name, entry in entries.items()
                if name not in (plain, row["ceiling"]) and (name == OURS or not name.startswith(OURS))
            ]
            found.append((row["name"], bars))
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    found = groups(results)
    speeds = [speed for _, bars in found for _, speed in bars]
    figure = Figure(figsize=(9, 1 + 0.22 * (len(speeds) + 1.7 * len(found))), layout="constrained")
    axes = figure.subplots()
    names: list[tuple[float, str]] = []
    position = 0.0
    for title, bars in found:
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        style: dict[str, Any] = {"weight": "bold", "fontsize": 8.5, "va": "center", "bbox": background}
        axes.text(0, position, title, transform=axes.get_yaxis_transform(), **style)
        for name, speed in bars:
            position += 1
            axes.barh(position, speed - 1, left=1, height=0.8, color=COLOURS.get(name, PEERS))
            axes.text(max(speed, 1), position, f" {times(speed)}", fontsize=9, va="center")
            names.append((position, name))
        position += 1.7
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlim(min(0.5, *speeds, 1) / 1.3, max(*speeds, 1, 2) * 1.5)
    axes.set_ylim(position - 0.7, -1)
    axes.set_yticks([place for place, _ in names], [name for _, name in names])
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_xlabel("times as fast as torch eager (gae: as a Python loop); log scale")
    figure.savefig(path, dpi=150)
