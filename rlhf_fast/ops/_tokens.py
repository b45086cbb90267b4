"""The checks that the vocabulary-level ops share: targets, mask and temperature of N tokens, made flat."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._vocab import accumulation_dtype


class Tokens(NamedTuple):
    """N tokens, flat."""

    targets: Tensor  # (N,) int64
    live: Tensor  # (N,) bool, True = counts: the mask, less the tokens whose target is ignore_index
    temperature: Tensor  # (N,) in the accumulation dtype; NaN where it cannot be used


def flat_tokens(
    op: str,
    data: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    *,
    temperature: float | Tensor,
    vocab: int,
    ignore_index: int,
    targets_name: str = "targets",
) -> Tokens:
    """Checks what comes beside ``data`` (..., features) and flattens it.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
        IndexError: on the CPU, a live target outside [0, vocab). On a GPU the check would synchronise, and under
            torch.compile it would break the graph; the op gives NaN in that row instead.
    """
    shape = data.shape[:-1]
    _checks.integral(op, **{targets_name: targets})
    _checks.shaped(op, shape, "one token id a row", **{targets_name: targets})
    _checks.same_device(op, data=data, **{targets_name: targets})
    if targets.dtype != torch.int64:  # in a narrower one ignore_index would wrap round to a token id
        targets = targets.to(torch.int64)
    live = targets != ignore_index
    mask = _checks.live_mask(op, mask, shape, data.device)
    if mask is not None:
        live = live & mask
    targets = _checks.constant(targets)
    if _checks.at_hand(targets):
        _in_range(op, targets_name, targets, live, vocab)
    return Tokens(flat(targets), flat(live), flat_temperature(op, temperature, data))


def flat(tokens: Tensor) -> Tensor:
    """(...) -> (N,). A call of torch that changes nothing still costs a microsecond or more."""
    return tokens if tokens.dim() == 1 else tokens.reshape(-1)


def unflat(tokens: Tensor, shape: torch.Size) -> Tensor:
    """(N,) -> (...)."""
    return tokens if len(shape) == 1 else tokens.reshape(shape)


def flat_temperature(op: str, temperature: float | Tensor, data: Tensor) -> Tensor:
    """One temperature a row of ``data`` (..., features), as (N,)."""
    shape = data.shape[:-1]
    checked = _checks.temperatures(op, temperature, shape, data.device)
    dtype = accumulation_dtype(data.dtype)
    if isinstance(checked, Tensor):
        rows = _checks.constant(checked).to(dtype).expand(shape).reshape(-1)
        return rows.masked_fill(~_checks.usable_temperature(rows), torch.nan)
    return torch.full((shape.numel(),), checked, dtype=dtype, device=data.device)


def vocabulary(op: str, columns: int, vocab_size: int | None) -> int:
    """The number of columns that are real: ``vocab_size``, or all of them."""
    if columns < 1:
        raise ValueError(f"{op}: the vocabulary needs at least one column; got {columns}")
    if vocab_size is None:
        return columns
    if not isinstance(vocab_size, int) or not 1 <= vocab_size <= columns:
        raise ValueError(f"{op}: vocab_size must be an integer from 1 to the {columns} columns; got {vocab_size!r}")
    return vocab_size


def _in_range(op: str, name: str, targets: Tensor, live: Tensor, vocab: int) -> None:
    if targets.numel() == 0:
        return
    lowest, highest = torch.aminmax(targets)
    if lowest.item() >= 0 and highest.item() < vocab:  # the usual case, in a third of the time
        return
    wrong = live & ((targets < 0) | (targets >= vocab))
    if bool(wrong.any()):
        position = tuple(wrong.nonzero()[0].tolist())
        raise IndexError(
            f"{op}: {name} must lie in [0, {vocab}); got {int(targets[position])} at position {position}. "
            "Mask that token, set it to ignore_index, or check the tokenizer against the model."
        )
