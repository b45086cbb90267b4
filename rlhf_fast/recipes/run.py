"""Runs the stages one after another, each in its own folder, with one report."""

import gc
import os
from pathlib import Path
from typing import Any

import torch

from rlhf_fast import checkpoint
from rlhf_fast.config import RunConfig, StageConfig
from rlhf_fast.config_load import dump_yaml
from rlhf_fast.errors import UserError
from rlhf_fast.monitor import read_summary
from rlhf_fast.recipes import dpo, ppo, reward, sft
from rlhf_fast.recipes.failure import failure_kept
from rlhf_fast.recipes.identity import setting_changes, told
from rlhf_fast.recipes.output import REPORT, WHOLE_RUN, check_output, check_run_output
from rlhf_fast.rewards import Functions
from rlhf_fast.text import one_line, tell

TRAIN = {"sft": sft.train, "reward": reward.train, "dpo": dpo.train, "ppo": ppo.train}


def run(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Runs the stages of ``config.stages`` in order; returns the figures of each.

    With resume_from_checkpoint "auto", finished stages are skipped and the stopped one is resumed. Folders and reward
    functions of all stages are checked before the first one starts.
    """
    stages: dict[str, StageConfig] = {name: getattr(config, name) for name in config.stages}
    for names in (config.ppo.reward_functions, config.ppo.eval_functions):
        Functions(names)
    if os.environ.get("RANK", "0") != "0":  # only process 0 writes; there is no process group yet
        return _train(stages)
    for name, stage in stages.items():
        check_output(stage, name)
    output = check_run_output(config)
    output.open(WHOLE_RUN, say=tell)
    try:
        dump_yaml(config, output.claim(output.record))
        output.claim(REPORT)
        return _train(stages)
    finally:
        output.release()


def _train(stages: dict[str, StageConfig]) -> dict[str, dict[str, Any]]:
    figures = {}
    for name, stage in stages.items():
        finished = read_summary(Path(stage.output_dir)) if stage.resume_from_checkpoint == "auto" else None
        if finished is not None:
            _check_finished(name, stage)
            figures[name] = finished["figures"]
            continue
        with failure_kept(stage.output_dir):
            figures[name] = TRAIN[name](stage)  # type: ignore[operator]
        gc.collect()  # frees the stage's base and optimizer before the next stage loads its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return figures


def _check_finished(name: str, stage: StageConfig) -> None:
    """Raises UserError if a finished stage had other settings, naming them; otherwise the stage can be skipped."""
    there = [path for path in checkpoint.list_checkpoints(Path(stage.output_dir)) if checkpoint.damage(path) is None]
    then = checkpoint.load(there[-1]).values.get("identity") if there else None
    changed = setting_changes(then, stage) if then else None
    if changed and changed.differing and not stage.resume_with_changes:
        raise UserError(
            f"{name} has finished with other settings: {told(changed.differing)}; run that stage again "
            f"(`rlhf-fast {name} --overwrite_output_dir true`), or keep what it made: --resume_with_changes true"
        )
    if os.environ.get("RANK", "0") == "0":
        tell(one_line(f"{name}: has finished before, skipped"))
