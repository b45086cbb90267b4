"""The words of the report for the figures in ``summary.json``: each figure's name, its unit and what it is.

A figure that is not declared here is shown under its own name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_fast.monitor.numbers import format_value


@dataclass(frozen=True)
class Words:
    """A figure in words. In a family, ``{name}`` stands for the name of a reward or eval function."""

    name: str
    unit: str = ""
    help: str = ""


WORDS = {
    "validation_loss": Words("Validation loss", "nats per token", "On held-out rows; the lowest of the run."),
    "validation_loss_first": Words("Validation loss before training", "nats per token", "On the same rows."),
    "accuracy": Words("Accuracy", "share of pairs", "Held-out pairs of which the preferred side scores higher."),
    "label_noise_ceiling": Words("Noise ceiling", "share of pairs", "The best accuracy that labels this noisy allow."),
    "loss": Words("Held-out loss", "per pair", "0.693 is guessing, for a reward model and for DPO's default loss."),
    "margin": Words("Margin", "score", "Score of the preferred side minus that of the other, mean."),
    "pairs": Words("Held-out pairs", "pairs"),
    "length_correlation": Words(
        "Length correlation", "", "How far the score follows the length of the response: 0 is not at all, 1 entirely."
    ),
    "length_accuracy": Words("Accuracy of length alone", "share of pairs", "Always the longer side, or the shorter."),
    "calibration_error": Words(
        "Calibration error", "share", "How far predicted chances lie from what is observed; 0 is best."
    ),
    "calibration_mean": Words("Raw score of SFT samples, mean", "score", "Shifted to 0 for PPO."),
    "calibration_std": Words("Raw score of SFT samples, spread", "score", "Standard deviation; scaled to 1 for PPO."),
    "kl_last_third": Words("KL from the SFT model", "nats per response"),
    "dataset": Words("Dataset"),
    "base": Words("Base model"),
    "steps": Words("Steps"),
    "stopped_by_monitor": Words("Stopped by the monitor"),
    "rolled_back": Words("Rolled back by the monitor"),
    "seconds": Words("Time", "seconds", "Set-up and evaluations included."),
    "peak_memory_gb": Words("Peak memory", "GB", "Of the GPU; without one, of the process."),
}
GAIN, BEFORE, AFTER = "_gain", "_sft", "_ppo"  # PPO's figures of the score and of each eval function


def score_words(name: str) -> str:
    """What PPO's figures call the function ``name``; ``scores`` is the score that is trained on."""
    return "score" if name == "scores" else f"{name} score"


def figure_words(key: str) -> Words:
    if key in WORDS:
        return WORDS[key]
    families = {
        GAIN: ("Gain in {}", ""),
        BEFORE: ("{} of the SFT model", "Mean on the held-out prompts."),
        AFTER: ("{} of the PPO policy", "Mean on the held-out prompts."),
    }
    for ending, (pattern, help) in families.items():
        if key.endswith(ending) and key != ending:
            name = pattern.format(score_words(key.removesuffix(ending)))
            return Words(name[0].upper() + name[1:], "score", help)
    return Words(key)


@dataclass(frozen=True)
class Figure:
    """A figure of one stage, as texts."""

    words: Words
    value: str
    interval: str
    note: str


def entry_of(figure: Any) -> Mapping[str, Any]:
    """``{"value", "low", "high", "note"}`` of a figure, of which the last three may be missing."""
    return figure if isinstance(figure, Mapping) else {"value": figure}


def read_figures(figures: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a summary in the order of their declaration; gold scores and the score before them, what is not
    declared after them."""
    order = {key: number for number, key in enumerate(WORDS)}
    endings = (GAIN, BEFORE, AFTER)

    def place(key: str) -> tuple[int, str, int]:
        if key in order:
            return 2, "", order[key]
        for number, ending in enumerate(endings):
            if key.endswith(ending):
                name = key.removesuffix(ending)
                return int(name == "scores"), name, number
        return 3, key, 0

    found = {}
    for key in sorted(figures, key=place):
        entry = entry_of(figures[key])
        low, high = entry.get("low"), entry.get("high")
        interval = "" if low is None or high is None else f"{format_value(low)} to {format_value(high)}"
        found[key] = Figure(figure_words(key), format_value(entry.get("value")), interval, str(entry.get("note") or ""))
    return found
