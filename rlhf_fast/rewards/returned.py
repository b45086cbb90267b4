"""From what a reward function returned to one number a completion, or None where it abstains."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from itertools import islice
from typing import Any, SupportsFloat, SupportsIndex

import numpy
import torch

from rlhf_fast.errors import UserError

# A reward's square, summed over a large rollout's tokens, must be a float32.
LARGEST = 1e12


def plain(returned: Any, count: int) -> Any:
    """A list of the first ``count`` + 1 items, numbers as float; what cannot be such a list is returned as it is.

    Iterators and numbers are the person's code: they may raise, or never end.
    """
    if isinstance(returned, torch.Tensor | numpy.ndarray) and returned.ndim == 2 and returned.shape[1] == 1:
        returned = returned.reshape(-1)
    if isinstance(returned, str | bytes | bytearray | Mapping | Set) or not isinstance(returned, Iterable):
        return returned
    if getattr(returned, "ndim", 1) != 1:
        return returned
    return [_number(item) for item in islice(returned, count + 1)]


def _number(item: Any) -> Any:
    if isinstance(item, torch.Tensor | numpy.ndarray | numpy.generic):
        if numpy.prod(item.shape) != 1:
            return item
        item = item.item()
    try:
        return float(item) if isinstance(item, SupportsFloat | SupportsIndex) else item
    except OverflowError:
        return item


def checked(name: str, returned: Any, values: Any, completions: Sequence[str]) -> list[float | None]:
    """``values``, which ``plain`` made of ``returned``. Raises UserError, one line, for every way to be wrong."""
    count = len(completions)
    must = f"reward function {name} must return"
    if not isinstance(values, list):
        raise UserError(f"{must} a list, one number a completion: {count}, got {shown(values)}")
    if len(values) != count:
        more = f"more than {count}" if len(values) > count else len(values)
        got = len(returned) if isinstance(returned, Sized) else more
        raise UserError(f"{must} one number a completion: {count}, got {got}")
    for index, value in enumerate(values):
        place = f"for completion {index}: {completions[index][:80]!r}"
        if value is not None and not (isinstance(value, float) and math.isfinite(value)):
            raise UserError(f"{must} finite numbers; got {shown(value)} {place} (None abstains)")
        if value is not None and abs(value) > LARGEST:
            raise UserError(f"{must} numbers from {-LARGEST:g} to {LARGEST:g}; got {value!r} {place}")
    return values


def shown(value: Any) -> str:
    """On one line, cut to 80 characters; of a tensor or an array its shape."""
    shape = getattr(value, "shape", ())
    if shape:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    try:
        text = repr(value)
    except Exception:  # a class of the person's, or an integer of very many digits
        text = f"an object of type {type(value).__name__}"
    return " ".join(text.split())[:80]
