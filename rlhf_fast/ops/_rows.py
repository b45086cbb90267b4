"""Shared by the ops on rows: checks, flattening to (N, features), and the row fields of the launchers' records.

A row is one token: its logits or its hidden state.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of the arithmetic and of the outputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Tokens(NamedTuple):
    """N tokens, flattened."""

    targets: Tensor  # (N,) int64
    live: Tensor | None  # (N,) bool, True = counts: mask and targets != ignore_index; None = all count
    temperatures: Tensor | None  # (N,) in the accumulation dtype, NaN where out of range; None = ``temperature``
    temperature: float = 1.0  # of all rows, if temperatures is None
    ignore_index: int = records.NO_INDEX  # a row with this target does not count either


def flat_tokens(op: str, data: Tensor, targets: Tensor, mask: Tensor | None, **options: Any) -> Tokens:
    """``tokens_for_kernel``, with ``ignore_index`` in ``live``."""
    return counted(tokens_for_kernel(op, data, targets, mask, **options))


def counted(tokens: Tokens) -> Tokens:
    """The same tokens, with ``ignore_index`` in ``live``."""
    if tokens.ignore_index == records.NO_INDEX:
        return tokens
    others = tokens.targets != tokens.ignore_index
    live = others if tokens.live is None else tokens.live & others
    return tokens._replace(live=live, ignore_index=records.NO_INDEX)


def tokens_for_kernel(
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
    """Checks targets, mask and temperature of ``data`` (..., features), and flattens them.

    Where the targets cannot be read, as on a GPU, the kernel compares them with ``ignore_index``, which saves launches.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
        IndexError: on the CPU, a live target outside [0, vocab). On a GPU the check would synchronise, and under
            torch.compile it would break the graph; the op gives NaN in that row instead.
    """
    shape = data.shape[:-1]
    _checks.integral(op, **{targets_name: targets})
    _checks.shaped(op, shape, "one token id a row", **{targets_name: targets})
    _checks.same_device(op, data=data, **{targets_name: targets})
    if targets.dtype != torch.int64:  # in a narrower dtype, ignore_index would wrap around to a token id
        targets = targets.to(torch.int64)
    live = _checks.live_mask(op, mask, shape, data.device)
    targets = _checks.constant(targets)
    if _checks.at_hand(targets):
        if not _all_in_vocabulary(targets, vocab) or 0 <= ignore_index < vocab:
            live = targets != ignore_index if live is None else live & (targets != ignore_index)
            _check_range(op, targets_name, targets, live, vocab)
        ignore_index = records.NO_INDEX
    temperatures, number = flat_temperature(op, temperature, data)
    return Tokens(flat(targets), None if live is None else flat(live), temperatures, number, ignore_index)


def flat(tokens: Tensor) -> Tensor:
    """(...) -> (N,). Skips a reshape that changes nothing, which would take about a microsecond."""
    return tokens if tokens.dim() == 1 else tokens.reshape(-1)


def as_rows(data: Tensor) -> Tensor:
    """(..., features) -> (N, features)."""
    return data if data.dim() == 2 else data.reshape(data.shape[:-1].numel(), data.shape[-1])


def in_batches(*logits: Tensor, inplace: bool = False) -> tuple[Tensor, ...]:
    """Logits (..., V) of one shape, as (N, V), or as (B, T, V) where N rows have no common stride: logits[:, 1:].

    ``inplace``: the first will be written to, and is copied if its rows share memory.
    """
    first = logits[0]
    if inplace and not _apart(first):
        logits = (first.contiguous(), *logits[1:])
    if first.dim() == 3 and min(first.shape[:2]) > 1 and any(x.stride(0) != x.shape[1] * x.stride(1) for x in logits):
        return tuple(unit_columns(x) for x in logits)
    return tuple(as_rows(x) for x in logits)


def rows_in(logits: Tensor) -> int:
    """N of logits (N, V) or (B, T, V)."""
    return logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[1]


def _apart(logits: Tensor) -> bool:
    """Whether no two rows of (..., V) share memory."""
    reach = 1
    for size, stride in zip(reversed(logits.shape), reversed(logits.stride()), strict=True):
        if size > 1 and stride < reach:
            return False
        reach += (size - 1) * stride
    return True


def unflat(tokens: Tensor, shape: torch.Size) -> Tensor:
    """(N,) -> (...)."""
    return tokens if len(shape) == 1 else tokens.reshape(shape)


def flat_temperature(op: str, temperature: float | Tensor, data: Tensor) -> tuple[Tensor | None, float]:
    """``temperatures`` and ``temperature`` of Tokens, for data (..., features)."""
    shape = data.shape[:-1]
    checked = _checks.temperatures(op, temperature, shape, data.device)
    if not isinstance(checked, Tensor):
        return None, checked
    rows = _checks.constant(checked).to(accumulation_dtype(data.dtype)).expand(shape).reshape(-1)
    return rows.masked_fill(~_checks.usable_temperature(rows), torch.nan), 1.0


def expanded(
    rows: Tensor, live: Tensor | None, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """live and temperatures (N,) of rows (N, features), for the torch reference."""
    count = rows.shape[0]
    if live is None:
        live = torch.ones(count, dtype=torch.bool, device=rows.device)
    if temperatures is None:
        temperatures = torch.full((count,), temperature, dtype=accumulation_dtype(rows.dtype), device=rows.device)
    return live, temperatures


def vocabulary(op: str, columns: int, vocab_size: int | None) -> int:
    """The number of columns in use: ``vocab_size``, or all of them."""
    if columns < 1:
        raise ValueError(f"{op}: the vocabulary needs at least one column; got {columns}")
    if vocab_size is None:
        return columns
    if not isinstance(vocab_size, int) or not 1 <= vocab_size <= columns:
        raise ValueError(f"{op}: vocab_size must be an integer from 1 to the {columns} columns; got {vocab_size!r}")
    return vocab_size


def _all_in_vocabulary(targets: Tensor, vocab: int) -> bool:
    """Whether all targets are in [0, vocab).

    Comparing only the lowest and the highest takes a third of the time.
    """
    if targets.numel() == 0:
        return False
    lowest, highest = torch.aminmax(targets)
    return lowest.item() >= 0 and highest.item() < vocab


def _check_range(op: str, name: str, targets: Tensor, live: Tensor, vocab: int) -> None:
    wrong = live & ((targets < 0) | (targets >= vocab))
    if bool(wrong.any()):
        position = tuple(wrong.nonzero()[0].tolist())
        raise IndexError(
            f"{op}: {name} must lie in [0, {vocab}); got {int(targets[position])} at position {position}. "
            "Mask that token, set it to ignore_index, or check the tokenizer against the model."
        )


# ---- backwards that may overwrite the logits: ctx has inplace_backward and spent; spent is False at first ------------


def refuse_spent(ctx: Any, op: str) -> None:
    """Call this before reading ctx.saved_tensors."""
    if ctx.spent:
        raise RuntimeError(
            f"{op}: inplace_backward=True wrote the gradient over the logits in the first backward, so there can be no "
            "second one; pass inplace_backward=False to run the backward twice"
        )


def gradient_memory(ctx: Any, logits: Tensor) -> Tensor:
    """Where the gradient of the logits is written: over them, or in new contiguous memory."""
    ctx.spent = ctx.inplace_backward
    # detach shares the memory and the version counter, so autograd detects any other use of the old logits
    return logits.detach() if ctx.inplace_backward else torch.empty_like(logits, memory_format=torch.contiguous_format)


# ---- parts of records ----------------------------------------------------------------------------------------------

_DTYPES = {dtype: code for code, dtype in enumerate(records.DTYPES)}
NOTHING = records.Logits(data=None, dtype=0, row_stride=0, batch_rows=1, batch_stride=0)


def rows_of(
    length: int,
    targets: Tensor | None,
    live: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int = records.NO_INDEX,
    *,
    vocab: int,
    softcap: float,
) -> records.Rows:
    return records.Rows(
        length=length,
        vocab=vocab,
        targets=None if targets is None else targets.contiguous(),
        live=None if live is None else live.contiguous(),
        ignore_index=ignore_index,
        temperatures=temperatures,
        temperature_stride=0 if temperatures is None else temperatures.stride(0),
        temperature=temperature,
        softcap=softcap,
    )


def logits_of(logits: Tensor) -> records.Logits:
    """The record of logits (N, V) or (B, T, V), or of their gradient, with contiguous columns."""
    if logits.dim() == 2:
        return records.Logits(logits, dtype_code(logits), logits.stride(0), max(logits.shape[0], 1), 0)
    return records.Logits(logits, dtype_code(logits), logits.stride(1), logits.shape[1], logits.stride(0))


def unit_columns(logits: Tensor) -> Tensor:
    """Logits (..., V) with contiguous columns, copied if they have none; rows may have any stride."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def dtype_code(data: Tensor) -> int:
    return _DTYPES[data.dtype]


def flat_rows(hidden: Tensor) -> Tensor:
    """(..., H) -> (N, H) with contiguous columns; copied where the rows do not have one stride."""
    return unit_columns(as_rows(hidden))


def hidden_of(rows: Tensor | None) -> records.Hidden:
    """The record of rows from ``flat_rows``; of None, the record of an absent tensor."""
    return records.Hidden(None, 0) if rows is None else records.Hidden(rows, rows.stride(0))
