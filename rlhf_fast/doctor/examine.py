"""Runs the checks on the stages of a run, one after another, and prints what they find."""

import copy
import gc
from collections.abc import Iterator

from rlhf_fast.config import RunConfig, StageConfig
from rlhf_fast.doctor import between, machine, pairs, rewards, rows, settings, start, tokens
from rlhf_fast.doctor.findings import Finding, failed, named, refused, run_checks
from rlhf_fast.doctor.output import print_findings, print_json
from rlhf_fast.doctor.subject import StageData, opened, read_stage
from rlhf_fast.errors import UserError
from rlhf_fast.recipes.heap import give_back_memory
from rlhf_fast.recipes.plan import stage_name
from rlhf_fast.recipes.stage import MICRO_BATCH_SIZE
from rlhf_fast.text import tell

NOT_PASSED = 4  # the exit code where there are errors


def doctor(config: RunConfig | StageConfig, *, as_json: bool, strict: bool) -> int:
    """Prints the findings on a run or a stage; returns 0, or NOT_PASSED with errors, or with ``strict`` warnings."""
    found = list(examine(config))
    (print_json if as_json else print_findings)(found)
    bad = [finding for finding in found if finding.level == "error" or strict and finding.level == "warning"]
    if bad:
        names = ", ".join(dict.fromkeys(f"{finding.stage} {finding.name}".strip() for finding in bad))
        tell(f"rlhf-fast: doctor: {len(bad)} of {len(found)} checks are not passed: {names}")
    return NOT_PASSED if bad else 0


def examine(config: RunConfig | StageConfig) -> Iterator[Finding]:
    """The findings of every check that applies. Nothing is written to disk."""
    if isinstance(config, RunConfig):
        stages: dict[str, StageConfig] = {name: getattr(config, name) for name in config.stages}
    else:
        stages = {stage_name(config): config}
    stages = {name: with_micro_batches(stage) for name, stage in stages.items()}
    read: dict[str, StageData] = {}
    for name, stage in stages.items():
        tell(f"doctor: {name}: settings and data")
        yield from run_checks(name, settings.CHECKS, stage)
        data = reading(name, stage)
        if isinstance(data, Finding):
            yield named(data, "data", name)
            continue
        read[name] = data
        checks = [*tokens.CHECKS, *rows.CHECKS, *(pairs.CHECKS if name in ("reward", "dpo") else []), *machine.CHECKS]
        yield from run_checks(name, checks, data)
    yield from run_checks("", between.CHECKS, read)
    yield from run_checks("", [machine.backends], None)
    for name, data in read.items():
        tell(f"doctor: {name}: model")
        yield from of_model(data, set(list(stages)[: list(stages).index(name)]))
        gc.collect()  # frees the model before the next stage's is loaded
        give_back_memory()


def reading(name: str, config: StageConfig) -> StageData | Finding:
    """The stage's data, or that they cannot be read."""
    try:
        return read_stage(name, config)
    except UserError as mistake:
        return refused(mistake)
    except Exception as failure:
        return failed(failure)


def of_model(data: StageData, made_before: set[str]) -> Iterator[Finding]:
    try:
        with opened(data, made_before) as stage:
            yield from run_checks(data.name, [*start.CHECKS, *rewards.CHECKS], stage)
    except UserError as mistake:
        yield named(refused(mistake), "base_model", data.name)
    except Exception as failure:
        yield named(failed(failure), "base_model", data.name)


def with_micro_batches(config: StageConfig) -> StageConfig:
    """``config`` with the micro-batches that the stage takes where none are set."""
    if config.micro_batch_size or config.micro_batch_tokens:
        return config
    changed = copy.copy(config)
    changed.micro_batch_size = MICRO_BATCH_SIZE
    return changed
