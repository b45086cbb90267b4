"""Calls reward functions on a rollout's responses, and computes metrics of their results."""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import TrainerState

from rlhf_fast.config import StageConfig
from rlhf_fast.data import PromptRow
from rlhf_fast.errors import UserError
from rlhf_fast.metrics import ABSTAINED, FIXED_OF_PPO, FUNCTION, REWARD_MEAN, REWARD_STD, Metric
from rlhf_fast.recipes.stage import Stage
from rlhf_fast.rewards import Functions, Numbers, RunView
from rlhf_fast.rewards.guard import print_error
from rlhf_fast.rollout import Response


@dataclass(frozen=True)
class Judged:
    """For each function, one number per response (None = abstained); and the functions' logged metrics."""

    each: dict[str, Numbers]
    view: RunView


def check_columns(rows: Sequence[PromptRow], *functions: Functions) -> None:
    """Raises UserError if a function needs a column that ``rows`` do not have."""
    columns = set().union(*(row.columns for row in rows))
    for group in functions if rows else ():
        group.check(columns)


def judge(
    stage: Stage[StageConfig], functions: Functions, responses: Sequence[Response], epoch: float | None = None
) -> Judged:
    """The results of each function on ``responses``. Its prints appear above the progress bar."""
    state = TrainerState(global_step=stage.step, max_steps=stage.total, epoch=epoch)
    view = RunView(len(responses), state, stage.say if stage.main else print_error)
    each = functions.each(
        [response.row.prompt for response in responses],
        [response.text for response in responses],
        [response.row.columns for response in responses],
        [response.token_ids for response in responses],
        view,
    )
    return Judged(each, view)


def metrics(stage: Stage[StageConfig], rewarders: Judged, scorers: Judged, *, model: bool) -> dict[Metric, float]:
    """Metrics over the responses of all processes; a function's figures leave out responses from which it abstained.

    Without a reward ``model`` they include the share of responses from which every reward function abstained, whose
    reward is 0.
    """
    found = {}
    for name, numbers in rewarders.each.items():
        values = present(stage.gather(numbers))
        found[REWARD_MEAN.of(name)] = mean(values)
        found[REWARD_STD.of(name)] = statistics.stdev(values) if len(values) > 1 else math.nan
    found |= {FUNCTION.of(name): mean(present(stage.gather(numbers))) for name, numbers in scorers.each.items()}
    if not model:
        found[ABSTAINED] = _abstained(stage, rewarders)
    return found


def _abstained(stage: Stage[StageConfig], rewarders: Judged) -> float:
    own = [set(numbers) == {None} for numbers in zip(*rewarders.each.values(), strict=True)]
    abstained = stage.gather(own)
    if any(abstained) and not stage.values.get("abstained"):
        stage.values["abstained"] = True  # reported once per run
        stage.say(
            f"ppo: every reward function abstained (None) from {sum(abstained)} of {len(abstained)} responses: their "
            "reward is 0, and rewards/abstained counts them"
        )
    return mean(abstained)


def logged(stage: Stage[StageConfig], judged: Sequence[Judged], metrics: Collection[Metric]) -> dict[str, float]:
    """The means of the values that functions passed to ``log_metric``, over the responses of all processes.

    Raises UserError if a name is one of ``metrics`` or of the metrics that every run has.
    """
    taken = FIXED_OF_PPO | {metric.name for metric in metrics}
    own = [(name, value) for one in judged for name, values in one.view.metrics.items() for value in values]
    found: dict[str, list[float]] = {}
    for name, value in stage.gather(own):
        found.setdefault(name, []).append(value)
    for name in found:
        if name in taken or name.startswith("perf/"):
            raise UserError(
                f"a reward function calls log_metric({name!r}): the run has a metric of that name; rename it"
            )
    return {name: mean(values) for name, values in found.items()}


def present(numbers: Numbers) -> list[float]:
    return [number for number in numbers if number is not None]


def mean(numbers: Sequence[float]) -> float:
    """The mean; NaN if there are no numbers."""
    return sum(numbers) / len(numbers) if numbers else math.nan
