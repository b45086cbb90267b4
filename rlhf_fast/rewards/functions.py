"""Python functions as rewards: one number a completion, or None. Functions written for TRL run unchanged."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.arguments import OWN, copied, plan
from rlhf_fast.rewards.awaited import await_together
from rlhf_fast.rewards.guard import describe, guarded
from rlhf_fast.rewards.loading import RewardFunction, load_function
from rlhf_fast.rewards.returned import LARGEST, checked, plain
from rlhf_fast.rewards.view import RunView

Numbers = list[float | None]


class Functions:
    """Several functions by their short names, what follows the colon.

    Args:
        names: FILE.py:NAME or MODULE:NAME.
        weights: one a function; none: 1 each.
        timeout: seconds that one call of a function may take, None for no limit.

    Raises UserError where a function cannot be loaded, or where two share one name.
    """

    def __init__(self, names: Sequence[str], *, weights: Sequence[float] = (), timeout: float | None = None) -> None:
        self._functions: dict[str, RewardFunction] = {}
        for name in names:
            short = name.rpartition(":")[2]
            if short in self._functions:
                raise UserError(
                    f"two reward functions are called {short!r}, the name of their metrics; give one of them another "
                    f"name in its file: better_{short.replace('.', '_')} = {short}"
                )
            self._functions[short] = load_function(name)
        self._weights = dict(zip(self._functions, weights or [1.0] * len(names), strict=True))
        self._timeout = timeout

    @property
    def names(self) -> list[str]:
        return list(self._functions)

    def check(self, columns: Collection[str]) -> None:
        """Raises UserError where a function needs what is neither a column nor given to every function."""
        for name, function in self._functions.items():
            plan(name, function, OWN, columns)

    def each(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Sequence[dict[str, Any]],
        completion_ids: Sequence[list[int]] | None = None,
        view: RunView | None = None,
    ) -> dict[str, Numbers]:
        """Per function, one number a completion; see ``call``."""
        batch = _batch(prompts, completions, completion_ids)
        return _call_all(self._functions, batch, completions, columns, view, self._timeout)

    def total(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Sequence[dict[str, Any]]
    ) -> list[float]:
        """The functions' weighted sum, one number a completion; 0 without functions."""
        return self.weighted(self.each(prompts, completions, columns), len(completions))

    def weighted(self, each: Mapping[str, Numbers], count: int) -> list[float]:
        """The weighted sum of ``each`` for ``count`` completions; a function that abstains is left out of it.

        Raises UserError where a sum is too large to be trained on.
        """
        sums = [0.0] * count
        for name, numbers in each.items():
            for index, number in enumerate(numbers):
                sums[index] += 0.0 if number is None else self._weights[name] * number
                if abs(sums[index]) > LARGEST:
                    raise UserError(
                        f"reward function {name}: {number!r} for completion {index}, times its weight of "
                        f"{self._weights[name]:g} (--reward_weights), makes a reward of {sums[index]:g}; the largest "
                        f"is {LARGEST:g}"
                    )
        return sums


def call(
    name: str,
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Sequence[dict[str, Any]],
    completion_ids: Sequence[list[int]] | None = None,
    *,
    timeout: float | None = None,
) -> Numbers:
    """One finite number a completion, None where the function abstains.

    The function is called by keyword, with what it names of ``prompts``, ``completions``, ``completion_ids``, the
    columns (``columns``: the other columns of each prompt's row), or with all of these where it takes ``**kwargs``; and
    with TRL's ``trainer_state``, ``log_extra`` and ``log_metric`` where it names them. A chat prompt's completion is a
    chat list too: ``[{"role": "assistant", "content": text}]``. It gets copies, may be async, and leaves the random
    state as it was.

    Raises UserError where the function raises, runs longer than ``timeout`` seconds, or returns another number of
    rewards or one that is not finite or too large.
    """
    batch = _batch(prompts, completions, completion_ids)
    return _call_all({name: function}, batch, completions, columns, None, timeout)[name]


def _batch(
    prompts: Sequence[Any], completions: Sequence[str], completion_ids: Sequence[list[int]] | None
) -> dict[str, list[Any]]:
    texts = [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    ids = {} if completion_ids is None else {"completion_ids": list(completion_ids)}
    return {"prompts": list(prompts), "completions": texts, **ids}


def _call_all(
    functions: Mapping[str, RewardFunction],
    batch: dict[str, list[Any]],
    completions: Sequence[str],
    columns: Sequence[dict[str, Any]],
    view: RunView | None,
    timeout: float | None,
) -> dict[str, Numbers]:
    """The functions one after the other; what is to be awaited then runs together."""
    if not completions:  # a process without a share of the batch; there are no columns to pass either
        return {name: [] for name in functions}
    names = sorted(set().union(*columns))
    here = view or RunView(len(completions))
    tools = here.arguments()
    lists = {name: [row.get(name) for row in columns] for name in names} | batch
    returned: dict[str, Any] = {}
    values: dict[str, Any] = {}
    try:
        for name, function in functions.items():
            positional, keywords = plan(name, function, [*batch, *tools], names, () if view else tools)
            given = {
                key: tools[key] if key in tools else copied(lists[key]) for key in [*positional, *keywords.values()]
            }
            by_keyword = {parameter: given[key] for parameter, key in keywords.items()}
            with guarded(f"reward function {name}", say=here.say, limit=timeout):
                returned[name] = function(*(given[key] for key in positional), **by_keyword)
                if not isinstance(returned[name], Awaitable | AsyncIterator):
                    values[name] = plain(returned[name], len(completions))
    except BaseException:
        for begun in returned.values():  # never to be awaited
            if inspect.iscoroutine(begun):
                begun.close()
        raise
    waiting = {name: value for name, value in returned.items() if name not in values}
    if waiting:
        with guarded(f"reward function {' or '.join(waiting)} (async)", say=here.say, limit=timeout):
            outcomes = await_together(waiting, len(completions))
        for name, (result, value) in outcomes.items():
            if isinstance(value, BaseException):
                raise UserError(f"reward function {name} raised {describe(value)}") from value
            returned[name], values[name] = result, value
    return {name: checked(name, returned[name], values[name], completions) for name in functions}
