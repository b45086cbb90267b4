"""What PPO learned: a table and a chart, from what `python -m rlhf_fast.bench.step.learning --json` wrote."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.bench import report
from rlhf_fast.bench.step.tables import machine

NAMES = {"rlhf-fast": "rlhf-fast", "trl": "TRL"}
COLOURS = {"rlhf-fast": "#1b6ca8", "trl": "#d9a441"}
WINDOW = 5  # steps at both ends that the table averages
HEADINGS = {
    "reward": "reward",
    "kl": "KL",
    "objective": "reward minus KL penalty",
    "explained_variance": "explained variance",
}


def table(results: dict[str, Any]) -> str:
    """Markdown: where and on what, and a row for each trainer."""
    work, both = results["work"], results["settings"]["both"]
    seeds = len({curve["seed"] for curve in results["curves"]})
    low, high = work["prompt_tokens"]
    told = (
        f"{machine(results)} Model {work['model']}, bf16; {work['batch_size']} prompts of {low} to {high} tokens, the "
        f"same at every step; {work['response_length']} response tokens each; {work['steps']} steps of "
        f"{work['ppo_epochs']} epochs; LoRA r={work['lora_r']}; learning rate {work['learning_rate']:g}; KL "
        f"coefficient {both['kl_coef']:g}. Means over {seeds} seeds, in brackets the lowest and the highest seed."
        + (" Quick sizes: the figures mean nothing." if results["quick"] else "")
    )
    headings = ("", f"reward, first {WINDOW} steps", *(f"{name}, last {WINDOW}" for name in HEADINGS.values()))
    rows = []
    for who, runs in by_trainer(results).items():
        last = [spread([run[name][-WINDOW:] for run in runs if name in run]) for name in HEADINGS]
        rows.append((NAMES[who], spread([run["reward"][:WINDOW] for run in runs]), *last))
    return f"{told}\n\n{report.table(headings, rows)}"


def by_trainer(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found = {who: [curve for curve in results["curves"] if curve["who"] == who] for who in NAMES}
    return {who: runs for who, runs in found.items() if runs}


def spread(runs: Sequence[Sequence[float]]) -> str:
    """The mean of the runs' means, with the lowest and the highest of these; empty where there are none."""
    means = [statistics.mean(run) for run in runs]
    return f"{statistics.mean(means):.2f} [{min(means):.2f}, {max(means):.2f}]" if means else ""


def draw(results: dict[str, Any], path: Path) -> None:
    """Reward over the steps, the seeds' mean in their range, and each seed's reward against its KL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    over_steps, against_kl = figure.subplots(1, 2, sharey=True)
    for who, runs in by_trainer(results).items():
        columns = list(zip(*(run["reward"] for run in runs), strict=True))
        steps = range(1, len(columns) + 1)
        over_steps.fill_between(
            steps, [min(c) for c in columns], [max(c) for c in columns], color=COLOURS[who], alpha=0.2, linewidth=0
        )
        over_steps.plot(steps, [statistics.mean(c) for c in columns], color=COLOURS[who], label=NAMES[who])
        for run in runs:
            against_kl.plot(
                blocks(run["kl"]), blocks(run["reward"]), color=COLOURS[who], marker="o", markersize=3, linewidth=1
            )
    over_steps.set(xlabel="step", ylabel="mean reward")
    against_kl.set(xlabel=f"KL to the reference, nats a response (means of {WINDOW} steps)")
    over_steps.legend(frameon=False)
    for axes in (over_steps, against_kl):
        axes.spines[["right", "top"]].set_visible(False)
        axes.grid(color="#e5e5e5")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def blocks(values: Sequence[float]) -> list[float]:
    """The mean of every WINDOW steps."""
    return [statistics.mean(values[start : start + WINDOW]) for start in range(0, len(values), WINDOW)]
