"""Keeps what a finished run measured, and renews the tables of the documentation.

`python bench/results.py runs/demo` writes bench/results/demo.json and renews the tables made from it, wherever the
README or a page of docs/ has `<!-- results demo -->` or `<!-- highlights demo -->` and `<!-- end -->`.
`python bench/results.py bench/results/cpu.json` renews the tables of what `rlhf-fast bench --json` wrote there, and
bench/results/step.json, learning.json and trl_patch.json those of `make bench-step`, `bench-learning` and `bench-trl`.
"""

import argparse
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from rlhf_fast.bench import report
from rlhf_fast.bench.peers import installed_version
from rlhf_fast.bench.step import curves
from rlhf_fast.bench.step.tables import of_trainers, tables
from rlhf_fast.bench.workload import COMPILED, EAGER, OURS

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "reward", "ppo")
END = "<!-- end -->"
DATA_KEYS = {"dataset", "dataset_name", "eval_dataset_name"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The README's rows: the first workload of each of these operations.
HIGHLIGHTS = ("masked_logprobs", "linear_logprobs", "linear_policy_loss", "ppo_loss", "gae")


def collect(run: Path) -> dict[str, Any]:
    """The stages' summaries, their settings and the machine."""
    found = {
        stage: json.loads(path.read_text()) for stage in STAGES if (path := run / stage / "summary.json").is_file()
    }
    if not found:
        raise SystemExit(f"{run}: no finished stage in it (sft, reward or ppo with a summary.json)")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for part in [settings, *settings.values(), *(summary["figures"] for summary in found.values())]:
        for key in DATA_KEYS & set(part if isinstance(part, dict) else ()):
            part[key] = part[key] and file_name(part[key])
    seconds = [summary["figures"].get("seconds") for summary in found.values()]
    return {
        "machine": machine(),
        "seconds": None if None in seconds else round(sum(seconds)),
        "stages": found,
        "config": settings,
    }


def file_name(data: str) -> str:
    """A path on this machine is cut to the file's name; a hub or built-in name is kept."""
    return Path(data).name if Path(data).exists() else data


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = (
        re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if platform.system() == "Linux" else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            name: installed_version(name) for name in ("torch", "triton", "transformers", "peft", "accelerate")
        },
    }


def table(results: dict[str, Any]) -> str:
    """Every figure: the rows of a bench, the tables of whole steps, that of learning, or one line for each figure
    of a run."""
    if "rows" in results:
        return report.summary(results)
    if "runs" in results:
        return tables(results)
    if "curves" in results:
        return curves.table(results)
    if "results" in results:
        return of_trainers(results)
    stages = {name: summary["figures"] for name, summary in results["stages"].items()}
    rows: list[tuple[str, str]] = []
    if "validation_loss" in stages.get("sft", {}):
        first, best = stages["sft"]["validation_loss_first"], stages["sft"]["validation_loss"]["value"]
        rows.append(("SFT validation loss", f"{first:.3f} → {best:.3f}"))
    if "accuracy" in stages.get("reward", {}):
        figures = stages["reward"]
        ceiling = (
            f"; the label noise caps it at {figures['label_noise_ceiling']:.0%}"
            if "label_noise_ceiling" in figures
            else ""
        )
        rows.append(
            (
                "reward model, held-out accuracy",
                f"{interval(figures['accuracy'], '.1%')}, {figures['pairs']} pairs{ceiling}",
            )
        )
    for name, figure in stages.get("ppo", {}).items():
        if name.endswith("_gain"):
            before, after = (stages["ppo"][name.replace("_gain", end)] for end in ("_sft", "_ppo"))
            rows.append(
                (
                    f"{name.removesuffix('_gain')}, SFT → PPO",
                    f"{before:+.2f} → {after:+.2f}, gain {interval(figure, '+.2f')}",
                )
            )
    if "kl_last_third" in stages.get("ppo", {}):
        target = results["config"]["ppo"]["kl_target"]
        rows.append(
            (
                "KL over the last third of steps",
                f"{stages['ppo']['kl_last_third']['value']:.2f} nats, target {target:g}",
            )
        )
    if results["seconds"] is not None:
        peak = max(figures["peak_memory_gb"] for figures in stages.values())
        rows.append(("time, memory", f"{results['seconds'] / 60:.1f} min, {peak:.1f} GB"))
    where = results["machine"]["gpu"] or report.processor(results["machine"])
    lines = [f"| {where} | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])


def interval(figure: dict[str, float], form: str) -> str:
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def highlights(results: dict[str, Any]) -> str:
    """A few rows of a bench: our time, that of torch, and the fastest of the others."""
    first = {row["op"]: row for row in reversed(results["rows"])}
    rows = []
    for row in (first[op] for op in HIGHLIGHTS if op in first):
        entries = row["contestants"]
        others = [name for name in report.others(row) if not name.startswith(OURS)]
        best = min(others, key=lambda name: entries[name]["ms"], default=None)
        beside = f"{best} {report.beside(row, best)}" if best else ""
        ours = report.milliseconds(entries[OURS]["ms"])
        rows.append((report.work_name(row), ours, report.beside(row, EAGER), report.beside(row, COMPILED), beside))
    headings = ("work", OURS, EAGER, COMPILED, "fastest other")
    return f"{report.where(results)}\n\n{report.table(headings, rows)}"


def renew(text: str, results: dict[str, Any], name: str) -> str:
    """A page's text with the tables of ``name`` made from ``results``."""
    for kind, make in (("results", table), ("highlights", highlights)):
        mark = f"<!-- {kind} {name} -->\n"
        if mark in text:
            before, rest = text.split(mark)
            text = f"{before}{mark}{make(results)}\n{rest[rest.index(END) :]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run's folder, or what `rlhf-fast bench --json` wrote")
    run = parser.parse_args().run
    path = ROOT / "bench" / "results" / f"{run.stem}.json"
    if run.is_dir():
        path.write_text(json.dumps(collect(run), indent=1, sort_keys=True) + "\n")
    elif run.resolve() != path.resolve():
        raise SystemExit(f"expected a run's folder or a file in {path.parent}; got {run}")
    results, name = json.loads(path.read_text()), path.stem
    pages = [page for page in PAGES if re.search(f"<!-- \\w+ {re.escape(name)} -->", page.read_text())]
    if not pages:
        raise SystemExit(f"no page has `<!-- results {name} -->` and `{END}`; add them where the table is to stand")
    for page in pages:
        page.write_text(renew(page.read_text(), results, name))
        print(f"renewed the tables of {path.relative_to(ROOT)} in {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
