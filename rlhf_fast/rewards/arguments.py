"""What a reward function is called with: by keyword, what its signature names. TRL's names, and the data's columns."""

import copy
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch

from rlhf_fast.errors import UserError

OWN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
KEYWORDS, POSITIONALS = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
PLACES = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def plan(
    name: str,
    function: Callable[..., Any],
    own: Collection[str],
    columns: Collection[str],
    only_named: Collection[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """(what goes in by position, parameter -> what goes in by keyword); each is one of ``own`` or of ``columns``.

    Two leading parameters of other names, ``f(p, c)``, are the prompts and the completions. ``**kwargs`` takes all but
    ``only_named``.

    Raises UserError for a parameter without a default that nothing fills, and for a column named like one of ``OWN``
    that the function would get.
    """
    parameters = _parameters(function)
    if parameters is None:  # of a C function: nothing tells what it takes
        return ["prompts", "completions"], {}
    filled = {*own, *columns}
    kinds = {parameter.kind for parameter in parameters.values()}
    named = {key: parameter for key, parameter in parameters.items() if parameter.kind not in (KEYWORDS, POSITIONALS)}
    places = [key for key, parameter in named.items() if parameter.kind in PLACES]
    takes = {key: key for key in named if key in filled}
    leading = list(zip(places, ("prompts", "completions"), strict=False))
    if len(leading) == 2 and all(_stands_for(named[key], what, named, filled) for key, what in leading):
        takes |= leading
    if KEYWORDS in kinds:
        takes |= {key: key for key in filled.difference(takes, takes.values(), only_named)}
    clash = [key for key in OWN if key in columns and (key in named or KEYWORDS in kinds)]
    if clash:
        raise UserError(
            f"the data has a column {clash[0]!r}, which is what reward functions call their own argument; rename it: "
            f"--rename_columns {clash[0]}=data_{clash[0]}"
        )
    if POSITIONALS in kinds and KEYWORDS not in kinds and len(places) < 2 and not {*places} & {*filled} - {"prompts"}:
        return ["prompts", "completions"], {key: what for key, what in takes.items() if key not in places}
    missing = [key for key, parameter in named.items() if parameter.default is parameter.empty and key not in takes]
    if missing:
        raise UserError(
            f"reward function {name} needs {missing[0]!r}, which is no column of the data; there are "
            f"{', '.join(sorted(columns)) or 'none'} (and {', '.join(OWN)}). Name a column so, --rename_columns "
            f"OLD={missing[0]}, or give the parameter a default"
        )
    by_position = [key for key in places if named[key].kind is inspect.Parameter.POSITIONAL_ONLY and key in takes]
    return [takes.pop(key) for key in by_position], takes


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    target = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None


def _stands_for(parameter: inspect.Parameter, what: str, named: Collection[str], filled: Collection[str]) -> bool:
    free = parameter.name not in filled and parameter.default is parameter.empty and what not in named
    return parameter.name == what or free


def copied(values: list[Any]) -> list[Any]:
    """Deep copies, so that a function edits its own. What has none, such as an open audio file, is passed as it is."""
    return [_copied(value) for value in values]


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except (TypeError, RuntimeError, copy.Error):
        return value
