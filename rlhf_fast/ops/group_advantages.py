"""Advantages of sampled responses from their rewards, relative to the other samples of their prompt."""

import torch
from torch import Tensor

from . import _checks
from ._aggregate import upcast

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline")


def group_advantages(
    rewards: Tensor, groups: Tensor | int, *, estimator: str = "grpo", epsilon: float = 1e-6
) -> Tensor:
    """One advantage per response, for losses without a critic. r is a response's reward, G its group, the batch all N.

    | estimator            | the advantage                                      | source                             |
    |----------------------|----------------------------------------------------|------------------------------------|
    | grpo                 | (r - mean of G) / (std of G + epsilon)             | GRPO, arXiv 2402.03300             |
    | dr_grpo              | r - mean of G                                      | Dr. GRPO, arXiv 2503.20783         |
    | rloo                 | r - mean of the others in G                        | RLOO, arXiv 2402.14740             |
    | reinforce++          | (r - mean of the batch) / (its std + epsilon)      | REINFORCE++, arXiv 2501.03262      |
    | reinforce++-baseline | a = r - mean of G; a / (std of the batch's a + epsilon) | the same, with a group baseline |

    Standard deviations divide by n - 1, as in TRL and verl. Where all rewards are equal, and in a group of one, which
    has no baseline, the advantage is 0 (reinforce++ alone does not look at groups). To give every token of a response
    its advantage: ``advantages[:, None].expand(-1, T)``.

    Args:
        rewards: (N,), float; one reward per response.
        groups: (N,) integers, equal for the responses to one prompt, in any order; or the size of every group, when
            the responses to a prompt stand together.
        estimator: a name of the table.
        epsilon: added to the standard deviation, >= 0, in units of reward. (TRL has 1e-4, verl 1e-6.)

    Returns:
        (N,), float32 (float64 for float64 rewards), without gradient. A NaN reward makes its group NaN, and the batch
        for the last two.

    Raises:
        TypeError: ``rewards`` is not a floating-point tensor, or ``groups`` are not integers.
        ValueError: a shape or device differs, N is no multiple of the size, an unknown estimator, a negative epsilon.
    """
    op = "group_advantages"
    _checks.floating(op, rewards=rewards)
    if rewards.dim() != 1:
        raise ValueError(f"{op}: rewards must have shape (N,), one a response; got {tuple(rewards.shape)}")
    _checks.one_of(op, "estimator", estimator, ESTIMATORS)
    _checks.non_negative(op, epsilon=epsilon)
    group = group_of_each(op, groups, "rewards", rewards)
    (wide,) = upcast(rewards.detach())
    values = wide.double()
    if estimator == "reinforce++":
        return _standardised(values, torch.zeros_like(group), epsilon).to(wide.dtype)
    if estimator == "grpo":
        return _standardised(values, group, epsilon).to(wide.dtype)
    advantages = values - sums_of_groups(values, group) / _sizes(group)
    if estimator == "rloo":
        advantages = advantages * (_sizes(group) / (_sizes(group) - 1).clamp(min=1))
    if estimator == "reinforce++-baseline":
        advantages = _scaled(advantages, advantages, torch.zeros_like(group), epsilon)
    return advantages.to(wide.dtype)


def group_of_each(op: str, groups: Tensor | int, name: str, rows: Tensor) -> Tensor:
    """(N,) int64: the number of the group of each row of ``rows`` (N, ...), which errors call ``name``; from 0 on."""
    count = rows.shape[0]
    if isinstance(groups, int):
        if groups < 1 or count % groups:
            raise ValueError(f"{op}: groups must be (N,) ids or a size that divides N = {count}; got {groups}")
        return torch.arange(count, device=rows.device) // groups
    _checks.integral(op, groups=groups)
    _checks.shaped(op, rows.shape[:1], f"one id a row of {name}", groups=groups)
    _checks.same_device(op, **{name: rows}, groups=groups)
    # numbered in the order of the sorted ids: torch.unique would make a GPU wait
    ids, order = groups.long().sort()
    numbers = torch.zeros_like(ids)
    numbers[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    return torch.empty_like(numbers).index_copy_(0, order, numbers)


def sums_of_groups(values: Tensor, group: Tensor) -> Tensor:
    """(N,) -> (N,): at each place the sum over its group."""
    return torch.zeros_like(values).index_add_(0, group, values)[group]


def _sizes(group: Tensor) -> Tensor:
    return sums_of_groups(torch.ones_like(group, dtype=torch.float64), group)


def _standardised(values: Tensor, group: Tensor, epsilon: float) -> Tensor:
    deviations = values - sums_of_groups(values, group) / _sizes(group)
    return _scaled(deviations, deviations, group, epsilon)


def _scaled(values: Tensor, deviations: Tensor, group: Tensor, epsilon: float) -> Tensor:
    """values / (std + epsilon) with the standard deviation of each group's deviations; 0 where that is 0."""
    std = (sums_of_groups(deviations.square(), group) / (_sizes(group) - 1).clamp(min=1)).sqrt()
    return torch.where(std == 0, 0.0, values / (std + epsilon))
