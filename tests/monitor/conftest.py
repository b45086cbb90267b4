"""A synthetic run folder with every chart, written by the package's writers; and a disk that fills up."""

import json
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from rlhf_fast.monitor.log import RunLog
from rlhf_fast.monitor.summary import write_summary

HOSTILE = '<script>alert("x")</script> & friends'


def write_sft(folder: Path, steps: int = 60) -> None:
    noise, log = Random(0), RunLog(folder)
    for step in range(1, steps + 1):
        log.metrics(step, {"loss": 1.6 + 1.7 * math.exp(-step / 15) + noise.gauss(0, 0.06), "lr": 2e-4})
        if step % 10 == 0:
            log.metrics(step, {"eval_loss": 1.72 + 1.6 * math.exp(-step / 15)})
    log.samples(steps, [{"split": "eval", "index": 0, "prompt": "Say hello.", "response": "Hello."}])
    figures = {
        "validation_loss": {"value": 1.7493, "note": "best, at step 60"},
        "validation_loss_first": 3.3,
        "steps": steps,
        "training tokens": 1234567,
        "dataset": "demo/kind <sea>",
    }
    write_summary(folder, "sft", figures)


def write_reward(folder: Path, steps: int = 80) -> None:
    noise, log = Random(1), RunLog(folder)
    for step in range(1, steps + 1):
        log.metrics(step, {"loss": 0.45 + 0.25 * math.exp(-step / 20) + noise.gauss(0, 0.02)})
        if step % 10 == 0:
            accuracy = 0.78 - 0.26 * math.exp(-step / 18)
            low, high = accuracy - 0.025, accuracy + 0.025
            values = {"eval_accuracy": accuracy, "eval_accuracy_low": low, "eval_accuracy_high": high}
            log.metrics(step, {**values, "eval_loss": 0.48 + 0.2 * math.exp(-step / 20)})
    reliability = [
        {"predicted": 0.55, "observed": 0.57, "count": 310},
        {"predicted": 0.65, "observed": 0.63, "count": 240},
        {"predicted": 0.75, "observed": 0.71, "count": 180},
        {"predicted": 0.85, "observed": 0.88, "count": 160},
        {"predicted": 0.95, "observed": 0.93, "count": 110},
    ]
    margins = [
        {"low": 0, "high": 0.5, "accuracy": 0.58, "count": 310},
        {"low": 0.5, "high": 1, "accuracy": 0.69, "count": 260},
        {"low": 1, "high": 2, "accuracy": 0.82, "count": 230},
        {"low": 2, "high": math.inf, "accuracy": 0.94, "count": 200},
    ]
    figures = {
        "accuracy": {"value": 0.7769, "low": 0.752, "high": 0.801, "note": "held-out pairs"},
        "calibration_error": 0.0231,
        "label_noise_ceiling": 0.85,
        "margin": math.nan,
        "reliability": reliability,
        "margin_buckets": margins,
    }
    write_summary(folder, "reward", figures)


def write_ppo(folder: Path, steps: int = 100, *, ended: bool = True) -> None:
    noise, log = Random(2), RunLog(folder)
    for step in range(steps + 1):
        done = step / max(steps, 1)
        values = {
            "objective/scores": 2.4 * (1 - math.exp(-2.5 * done)) + noise.gauss(0, 0.08),
            "objective/gold": 1.4 * math.sin(2.2 * done) + noise.gauss(0, 0.1),
            "objective/kl": 8.5 * (1 - math.exp(-4 * done)) + noise.gauss(0, 0.3),
            "objective/kl_target": 6.0,
            "objective/kl_coef": 0.05 * (1 + 0.6 * done),
            "objective/entropy": 42 - 15 * done + noise.gauss(0, 0.8),
            "response/length_mean": 41 + 9 * done + noise.gauss(0, 1.0),
            "response/distinct_2": 0.82 - 0.05 * done,
            "critic/explained_variance": math.nan if 40 <= step < 45 else 0.7 - 1.1 * math.exp(-5 * done),
            "policy/clipfrac_avg": 0.08 + noise.gauss(0, 0.01),
            "perf/seconds_rollout": 6.1 + noise.gauss(0, 0.2),
            "perf/seconds_score": 1.2,
            "perf/seconds_update": 4.4 + noise.gauss(0, 0.1),
            "perf/peak_memory": 1.5,
        }
        log.metrics(step, values)
        if step:
            log.samples(step, [train_sample(step, done, why) for why in ("first", "highest_kl")])
        if step % 10 == 0:
            log.metrics(step, {"eval/gold": 1.5 * math.sin(2.2 * done), "eval/scores": 2.3 * (1 - math.exp(-2 * done))})
            log.samples(step, [sample(step, done, index) for index in range(15)])
    if ended:
        figures = {
            "gold_gain": {"value": 1.213, "low": 1.08, "high": 1.34, "note": "64 held-out prompts"},
            "scores_gain": {"value": 2.2, "low": 2.1, "high": 2.3},
            "scores_ppo": 2.21,
            "kl_last_third": {"value": 8.3, "note": "target 6"},
            "my own": 5,
        }
        write_summary(folder, "ppo", figures)
        verdict = {
            "name": "kl_explosion",
            "first_step": round(0.4 * steps),
            "last_step": round(0.6 * steps),
            "confidence": 0.85,
            "metrics": ["objective/kl", "objective/scores", "val/ratio"],
            "samples": [train_sample(steps, 1.0, "highest_kl")],
            "reason": "KL rose from 2 to 20 nats, more than three times its target.",
            "advice": "Lower the learning rate <half>.",
        }
        (folder / "verdicts.json").write_text(json.dumps({"verdicts": [verdict]}), encoding="utf-8")


def sample(step: int, done: float, index: int) -> dict[str, object]:
    prompt = f"{HOSTILE} {index}" if index == 0 else f"Write one kind sentence about the sea, take {index}."
    return {
        "split": "eval",
        "index": index,
        "prompt": prompt,
        "response": f"It is wide \x1b[0m and {'blue, calm and generous' if step else 'wet'}.\nstep {step} row {index}",
        "score": 2.0 * done + index / 10,
        "gold": None if index == 1 else 1.1 * done,
        "length": 12 + index + (8 if step else 0),
        "stopped": True,
    }


def train_sample(step: int, done: float, why: str) -> dict[str, object]:
    tokens = [HOSTILE, " is", " wide\n", "\u202eand", "\x1b[31m", " b" + "l" * 300 + "ue", "."]
    return {
        "step": step,
        "split": "train",
        "index": step,
        "prompt": "Write about the sea.",
        "response": "".join(tokens),
        "stopped": False,
        "score": 2.0 * done,
        "kl": 1.0 + 3 * done,
        "length": len(tokens),
        "why": why,
        "tokens": tokens,
        "token_kl": [0.0, 0.2, 0.7, 2.5, -0.3, -1.0, -4.0],
        "token_advantage": [1.0, -0.2, 0.05, 0.0, 3.0, -3.0, 0.7],
    }


def write_run(folder: Path) -> Path:
    write_sft(folder / "sft")
    write_reward(folder / "reward")
    write_ppo(folder / "ppo")
    (folder / "config.yaml").write_text("ppo:\n  note: <b>bold</b>\n", encoding="utf-8")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def sft() -> Callable[..., None]:
    return write_sft


@pytest.fixture
def reward() -> Callable[..., None]:
    return write_reward


@pytest.fixture
def ppo() -> Callable[..., None]:
    return write_ppo


@pytest.fixture
def fill_disk() -> Iterator[Callable[[int], None]]:
    """``fill_disk(size)``: from now on no file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
