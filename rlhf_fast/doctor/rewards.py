"""Checks of PPO's Python reward functions: each is called once, on sampled responses to held-out prompts."""

from collections.abc import Sequence

from rlhf_fast.config import PPOConfig
from rlhf_fast.doctor.findings import Check, Finding, ok, warning
from rlhf_fast.doctor.subject import OpenStage
from rlhf_fast.recipes.judging import check_columns
from rlhf_fast.rewards import Functions


def reward_functions(opened: OpenStage) -> Finding | None:
    if not isinstance(opened.config, PPOConfig):
        return None
    return called(opened, opened.config.reward_functions)


def eval_functions(opened: OpenStage) -> Finding | None:
    if not isinstance(opened.config, PPOConfig):
        return None
    return called(opened, opened.config.eval_functions)


def called(opened: OpenStage, names: Sequence[str]) -> Finding | None:
    """Raises UserError where a function raises, returns NaN, or anything but one number a response."""
    if not names:
        return None
    functions = Functions(names, timeout=opened.config.reward_timeout)
    check_columns(opened.data.rows, functions)
    check_columns(opened.data.held_out, functions)
    responses = opened.responses
    results = functions.each(
        [response.row.prompt for response in responses],
        [response.text for response in responses],
        [response.row.columns for response in responses],
        [response.token_ids for response in responses],
    )
    said, flat = [], []
    for name, numbers in results.items():
        shown = ", ".join("None" if number is None else f"{number:.3g}" for number in numbers)
        said.append(f"{name}: {shown}")
        if len(set(numbers)) == 1 and len(numbers) > 1:
            flat.append(name)
    found = f"on {len(responses)} sampled responses, {'; '.join(said)}"
    if flat:
        why = "A score that is the same for every response teaches nothing, and measures nothing."
        change = "Look at what the function reads of the responses; if it is right, the task is too hard for this base."
        return warning(f"{found}: the same for all of them ({', '.join(flat)})", why, change)
    return ok(found)


CHECKS: list[Check] = [reward_functions, eval_functions]
