"""The tables of whole steps, from what `python -m rlhf_fast.bench.step --json` wrote."""

import statistics
from collections.abc import Sequence
from typing import Any

from rlhf_fast.bench import report
from rlhf_fast.bench.step.arithmetic import flop
from rlhf_fast.bench.step.contest import SHORT

PHASES = {"rollout": "rollout", "score": "scoring", "update": "update"}
BASELINES = {"trl": "TRL", "peft": "generate"}


class Entry:
    """All runs of one row; the first step of each run is left out where there are more."""

    def __init__(self, runs: Sequence[dict[str, Any]], results: dict[str, Any]) -> None:
        self.row, self.results = runs[0], results
        self.seconds = statistics.median(second for run in runs for second in timed(run["seconds"]))
        self.peak_gb = max(run["peak_memory_gb"] for run in runs)
        self.phases = {
            phase: statistics.median(second for run in runs for second in timed(run["phases"][phase]))
            for phase in self.row["phases"]
        }
        tokens = [count for run in runs for count in timed(run["response_tokens"])]
        stage = self.row["stage"]
        self.tokens = statistics.median(tokens) if tokens else results["work"]["tokens"][stage]

    @property
    def rate(self) -> float:
        """Tokens a second: of responses, in SFT and reward training all that is trained on."""
        return self.tokens / self.seconds

    @property
    def name(self) -> str:
        size = self.row["flags"].get("micro_batch_size")
        return self.row["name"] + (f", micro-batch {size}" if size else "")

    def floor_shares(self) -> dict[str, float]:
        """Phase -> the floor as a share of the time taken. Of rlhf-fast alone: the floor is that of its own roles."""
        if self.row["who"] != "rlhf-fast":
            return {}
        flags, work = self.row["flags"], self.results["work"]
        layers = flags.get("lora_layers")
        whole = int(flags.get("micro_batch_size", 0)) >= work["batch_size"]
        needed = flop(self.row["stage"], work, int(layers) if layers else None, whole)
        took = self.phases if self.row["stage"] == "ppo" else {"step": self.seconds}
        peak = self.results["peaks"][self.row["dtype"]]
        return {phase: needed[phase] / peak / seconds for phase, seconds in took.items()}


def timed(values: Sequence[float]) -> Sequence[float]:
    return values[1:] or values


def tables(results: dict[str, Any]) -> str:
    """Markdown: where and on what, speed of PPO, what sharing saves, sampling alone, SFT and reward training."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        grouped.setdefault(run["key"], []).append(run)
    entries = [Entry(runs, results) for runs in grouped.values()]
    ppo = [entry for entry in entries if entry.row["stage"] == "ppo"]
    speed = [entry for entry in ppo if entry.row["speed"]]
    training = [entry for entry in entries if entry.row["stage"] in ("sft", "reward")]
    parts = [
        where(results),
        titled("A step of PPO", speed_table(speed)),
        titled("What sharing saves, at the same batch", memory_table([e for e in ppo if e.row["memory"]])),
        titled("Sampling alone", rollout_table(entries)),
        titled("A step of SFT and of reward training", training_table(training)),
        "\n".join(f"- {key}: {reason}" for key, reason in (results["failed"] | results["missing"]).items()),
    ]
    return "\n\n".join(part for part in parts if part)


def titled(title: str, table: str) -> str:
    return f"**{title}**\n\n{table}" if table else ""


def machine(results: dict[str, Any]) -> str:
    """The processor, our packages, and the peers' own."""
    packages = {
        name: version
        for who, found in results["versions"].items()
        for name, version in found.items()
        if name in ("torch", "transformers", "peft") and who == "rlhf-fast" or name == who
    }
    found = results["machine"]
    return f"{report.processor(found)}; {', '.join(f'{n} {v}' for n, v in packages.items())}."


def where(results: dict[str, Any]) -> str:
    work = results["work"]
    low, high = work["prompt_tokens"]
    rates = ", ".join(f"{SHORT[dtype]} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in results["peaks"].items())
    return (
        f"{machine(results)} Load of the machine before the first run: {results['machine']['load_before']:.1f}. "
        f"Model {work['model']}; data {work['data']}. PPO: {work['batch_size']} prompts of {low} to {high} tokens "
        f"({work['tokens']['prompts']} in all), {work['response_length']} response tokens each, {work['ppo_epochs']} "
        f"epochs, one mini-batch, LoRA r={work['lora_r']} on all linear layers. SFT and reward training: "
        f"{work['batch_size']} rows of up to {work['max_length']} tokens in micro-batches of "
        f"{work['train_micro_batch']}. Best rate of a matrix product here: {rates}."
        + (" Quick sizes: the figures mean nothing." if results["quick"] else "")
    )


def baselines(entry: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """The peer's rows that the entry is measured by: of its stage and dtype, at any micro-batch."""
    alike = [e for e in entries if (e.row["stage"], e.row["dtype"]) == (entry.row["stage"], entry.row["dtype"])]
    return [e for e in alike if e.row["who"] in BASELINES]


def beside(entry: Entry, entries: Sequence[Entry]) -> tuple[str, str]:
    """The rate against the peer's best rate, and the memory against its least."""
    found = baselines(entry, entries)
    if not found or entry in found:
        return "", ""
    rate, peak = max(base.rate for base in found), min(base.peak_gb for base in found)
    return report.times(entry.rate / rate), f"{entry.peak_gb / peak:.0%}"


def phases(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{PHASES[phase]} {value:{form}}" for phase, value in values.items() if phase in PHASES)


def speed_table(entries: Sequence[Entry]) -> str:
    if not entries:
        return ""
    headings = (
        "",
        "base",
        "s a step",
        "response tokens/s",
        "against TRL",
        "peak memory",
        "of TRL's",
        "seconds by phase",
    )
    rows = [
        (
            entry.name,
            SHORT[entry.row["dtype"]],
            f"{entry.seconds:.2f}",
            f"{entry.rate:.1f}",
            times,
            f"{entry.peak_gb:.2f} GB",
            share,
            phases(entry.phases, ".2f"),
            phases(entry.floor_shares(), ".0%"),
        )
        for entry in entries
        for times, share in [beside(entry, entries)]
    ]
    return report.table((*headings, "of the arithmetic floor"), rows)


def memory_table(entries: Sequence[Entry]) -> str:
    rows = [
        (entry.row["memory"], SHORT[entry.row["dtype"]], f"{entry.peak_gb:.2f} GB", f"{entry.seconds:.2f}")
        for entry in entries
    ]
    return report.table(("", "base", "peak memory", "s a step"), rows) if rows else ""


def rollout_table(entries: Sequence[Entry]) -> str:
    """generate beside the rollout phase of our PPO rows."""
    generate = {entry.row["dtype"]: entry for entry in entries if entry.row["stage"] == "rollout"}
    rows = [(e.name, SHORT[dtype], f"{e.seconds:.2f}", f"{e.rate:.1f}", "") for dtype, e in generate.items()]
    for entry in entries:
        if entry.row["who"] == "rlhf-fast" and entry.row["dtype"] in generate and entry.row["speed"] and entry.phases:
            seconds, base = entry.phases["rollout"], generate[entry.row["dtype"]]
            rate = entry.tokens / seconds
            rows.append(
                (
                    f"{entry.name}: its rollout",
                    SHORT[entry.row["dtype"]],
                    f"{seconds:.2f}",
                    f"{rate:.1f}",
                    report.times(rate / base.rate),
                )
            )
    return report.table(("", "base", "s a batch", "response tokens/s", "against generate"), rows) if rows else ""


def training_table(entries: Sequence[Entry]) -> str:
    rows = [
        (
            entry.row["stage"],
            entry.name,
            SHORT[entry.row["dtype"]],
            f"{entry.seconds:.2f}",
            f"{entry.rate:.0f}",
            times,
            f"{entry.peak_gb:.2f} GB",
            share,
            "".join(f"{value:.0%}" for value in entry.floor_shares().values()),
        )
        for entry in entries
        for times, share in [beside(entry, entries)]
    ]
    headings = ("stage", "", "base", "s a step", "tokens/s", "against TRL", "peak memory", "of TRL's")
    return report.table((*headings, "of the arithmetic floor"), rows) if rows else ""


def of_trainers(found: dict[str, Any]) -> str:
    """The table of ``bench/trl_patch.py``: a row a trainer and form, relative to TRL as it is."""
    rows = []
    for result in found["results"]:
        plain = next(other for other in found["results"] if other["trainer"] == result["trainer"])
        rows.append(
            (
                result["trainer"],
                result["form"],
                f"{result['seconds']:.2f} s",
                f"{plain['seconds'] / result['seconds']:.2f}x",
                f"{plain['median'] / result['median']:.2f}x",
                f"{result['peak_gb']:.2f} GB",
                f"{result['peak_gb'] / plain['peak_gb']:.0%}",
            )
        )
    settings, versions = found["settings"], ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    work = (
        f"{report.processor(found['machine'])}; {versions}. {settings['model']}, {settings['dtype']}, LoRA "
        f"r={settings['lora_r']} on all linear layers, batches of {settings['batch_size']}, at most "
        f"{settings['max_length']} tokens; GRPO and RLOO: {settings['response_length']} response tokens, sampled by "
        "TRL at every fourth step. The mean step has that time in it, the median step has not."
    )
    headings = ("trainer", "with", "mean step", "faster", "median step: faster", "peak memory", "of TRL's")
    return f"{work}\n\n{report.table(headings, rows)}"
