"""Python functions as rewards: ``f(prompts, completions, **columns) -> list of numbers``."""

import importlib
import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError, nearest

RewardFunction = Callable[..., Sequence[float]]


def load_function(name: str) -> RewardFunction:
    """The function behind ``FILE.py:NAME`` or ``MODULE:NAME``. Raises UserError for what is missing in it."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise UserError(f"a reward function is named FILE.py:NAME or MODULE:NAME; got {name!r}")
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise UserError(f"reward function {name}: no file {place}")
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file raises when it runs
        raise UserError(f"reward function {name}: {place} cannot be imported: {_what(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"reward function {name}: no function {attribute!r} in {place}{nearest(attribute, known)}")
    return function


class Functions:
    """Several functions by their short names, what follows the colon. Raises UserError where two share one."""

    def __init__(self, names: Sequence[str]) -> None:
        self._functions: dict[str, RewardFunction] = {}
        for name in names:
            short = name.rpartition(":")[2]
            if short in self._functions:
                raise UserError(f"two reward functions are called {short!r}; rename one of them")
            self._functions[short] = load_function(name)

    @property
    def names(self) -> list[str]:
        return list(self._functions)

    def each(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Sequence[dict[str, Any]]
    ) -> dict[str, list[float]]:
        """Per function, one number a completion; see ``call``."""
        return {name: call(name, f, prompts, completions, columns) for name, f in self._functions.items()}

    def total(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Sequence[dict[str, Any]]
    ) -> list[float]:
        """The functions' sum, one number a completion; 0 without functions."""
        each = self.each(prompts, completions, columns)
        return [float(sum(rewards[i] for rewards in each.values())) for i in range(len(completions))]


def call(
    name: str,
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Sequence[dict[str, Any]],
) -> list[float]:
    """One finite number a completion.

    A chat prompt's completion is passed as a chat list too: ``[{"role": "assistant", "content": text}]``. ``columns``:
    the other columns of each prompt's row; a function gets the ones that it names, or all where it takes ``**kwargs``.

    Raises UserError where the function raises, or returns another number of rewards or one that is not finite.
    """
    if not completions:  # a process without a share of the batch; there are no columns to pass either
        return []
    texts = [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    try:
        returned = function(list(prompts), texts, **_columns(function, columns))
    except Exception as error:  # a user's code: any exception, told with the function's name
        raise UserError(f"reward function {name} raised {_what(error)}") from error
    if not isinstance(returned, Iterable):
        raise UserError(
            f"reward function {name} must return a list, one number a completion: {len(completions)}, got {returned!r}"
        )
    rewards = list(returned)
    if len(rewards) != len(completions):
        raise UserError(
            f"reward function {name} must return one number a completion: {len(completions)}, got {len(rewards)}"
        )
    for index, reward in enumerate(rewards):
        if not _is_finite(reward):
            raise UserError(
                f"reward function {name} must return finite numbers; got {reward!r} for completion {index}: "
                f"{completions[index][:80]!r}"
            )
    return [float(reward) for reward in rewards]


def _what(error: BaseException) -> str:
    """The exception on one line, with the place in the user's code where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    ours = (__file__, importlib.__file__)
    inside = [frame for frame in frames if frame.filename not in ours and not frame.filename.startswith("<frozen")]
    return f"{text} ({inside[-1].filename}, line {inside[-1].lineno})" if inside else text


def _is_finite(reward: Any) -> bool:
    """NumPy and torch scalars count as numbers too."""
    try:
        return math.isfinite(reward)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # None, texts, arrays, huge integers, tensors
        return False


def _columns(function: RewardFunction, columns: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = sorted(set().union(*columns)) if columns else []
    for taken in {"prompts", "completions"}.intersection(names):
        raise UserError(
            f"the data has a column {taken!r}, which is what reward functions call their own argument; rename it: "
            f"--rename_columns {taken}=data_{taken}"
        )
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        wanted = {parameter.name for parameter in parameters}
        names = [name for name in names if name in wanted]
    return {name: [row.get(name) for row in columns] for name in names}
