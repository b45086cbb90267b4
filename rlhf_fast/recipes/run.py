"""The three stages in a row, each in its own folder of the run's, with one report."""

import copy
import gc
import os
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.config import RunConfig, StageConfig
from rlhf_fast.config_load import dump_yaml
from rlhf_fast.monitor import read_summary
from rlhf_fast.recipes import ppo, reward, sft
from rlhf_fast.recipes.output import REPORT, WHOLE_RUN, check_output, check_run_output
from rlhf_fast.rewards import Functions
from rlhf_fast.text import tell

TRAIN = {"sft": sft.train, "reward": reward.train, "ppo": ppo.train}


def run(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Runs the stages of ``config.stages`` in order; returns each one's figures.

    With resume_from_checkpoint "auto" a stage that has finished is passed over and the one that was stopped goes on.
    What can be wrong is looked for in all stages before the first one starts: folders, reward functions.
    """
    stages: dict[str, StageConfig] = {name: getattr(config, name) for name in config.stages}
    for names in (config.ppo.reward_functions, config.ppo.eval_functions):
        Functions(names)
    if os.environ.get("RANK", "0") != "0":  # of several processes one writes; no process group is there yet
        return _train(stages)
    for stage in stages.values():
        check_output(stage)
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
            figures[name] = finished["figures"]
            continue
        figures[name] = TRAIN[name](copy.copy(stage))  # type: ignore[operator]
        gc.collect()  # the stage's base and optimizer, before the next one loads its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return figures
