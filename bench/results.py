"""Keeps what a finished run measured: `python bench/results.py runs/demo` writes bench/results/demo.json and renews
the table between `<!-- results demo -->` and `<!-- end -->` in README.md. `python bench/results.py
bench/results/cpu.json` renews the tables of what `rlhf-fast bench --json` wrote there.
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

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "reward", "ppo")
DATA_KEYS = {"dataset", "dataset_name", "eval_dataset_name"}


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
    """Where a file lay is this machine's business; a hub or built-in name is kept."""
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
    """The README's table: one line a figure."""
    if "rows" in results:
        return report.summary(results)
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
    where = results["machine"]["gpu"] or f"{results['machine']['cores']} cores of {results['machine']['cpu']}"
    lines = [f"| {where} | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])


def interval(figure: dict[str, float], form: str) -> str:
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def renew(text: str, name: str, results: dict[str, Any]) -> str:
    """The README's text with the table of ``name`` made from ``results``."""
    pattern = re.compile(rf"(<!-- results {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no `<!-- results {name} -->` ... `<!-- end -->` to renew")
    return pattern.sub(lambda match: f"{match[1]}{table(results)}\n{match[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder, or what `rlhf-fast bench --json` wrote")
    run = parser.parse_args().run
    path = ROOT / "bench" / "results" / f"{run.stem}.json"
    if run.is_dir():
        path.write_text(json.dumps(collect(run), indent=1, sort_keys=True) + "\n")
    elif run.resolve() != path.resolve():
        raise SystemExit(f"expected a run's folder or a file in {path.parent}; got {run}")
    readme = ROOT / "README.md"
    readme.write_text(renew(readme.read_text(), path.stem, json.loads(path.read_text())))
    print(f"wrote {path.relative_to(ROOT)} and its table in README.md")


if __name__ == "__main__":
    main()
