"""Reductions of per-token values to one number: masked mean, loss aggregation, and a sum in a fixed order."""

import math

import torch

from rlhf_fast.kernels.records import AGGREGATIONS
from rlhf_fast.ops import _checks


def reduced(
    values: torch.Tensor,
    live: torch.Tensor | None,
    *,
    aggregation: str,
    num_items: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """``aggregate`` without checks: values in float32 or float64; live of their shape, bool, None = everywhere."""
    if aggregation == "token-mean":
        return _divide(_total(values, live), _count(values, live) if num_items is None else num_items)

    if live is None:
        live = torch.ones_like(values, dtype=torch.bool)
    lengths = live.sum(-1)
    per_sequence = ordered_sum(torch.where(live, values, 0.0))
    if aggregation == "seq-mean-token-mean":
        per_sequence = per_sequence / lengths.clamp(min=1)
    if aggregation == "seq-mean-token-sum-norm":
        per_sequence = per_sequence / max(values.shape[1], 1)
    return _divide(ordered_sum(per_sequence), (lengths > 0).sum() if num_items is None else num_items)


def token_weights(
    tokens: torch.Tensor,
    live: torch.Tensor | None,
    *,
    aggregation: str,
    num_items: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights of ``reduced``: reduced(values) = sum(weights * values). float32, shape of ``tokens``.

    Args:
        live: bool, of that shape, True = counts; None counts every token.
    """
    weights = torch.ones_like(tokens, dtype=torch.float32) if live is None else live.float()
    if aggregation == "token-mean":
        return _divide(weights, _count(weights, live) if num_items is None else num_items)
    if live is None:
        live = torch.ones_like(tokens, dtype=torch.bool)
    lengths = live.sum(-1, keepdim=True)
    if aggregation == "seq-mean-token-mean":
        weights = weights / lengths.clamp(min=1)
    if aggregation == "seq-mean-token-sum-norm":
        weights = weights / max(live.shape[1], 1)
    return _divide(weights, (lengths > 0).sum() if num_items is None else num_items)


def scalar_tensor(num_items: float | torch.Tensor | None) -> torch.Tensor | None:
    """``num_items`` as a tensor (), as the custom ops take it; None stays None. A number stays on the CPU, where a
    launcher can read it without waiting for a GPU.
    """
    if isinstance(num_items, (int, float)):
        return torch.full((), float(num_items), dtype=torch.float64, device="cpu")
    return num_items


def masked_mean(values: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """The mean of ``values`` where ``live`` (bool, None = everywhere), 0-dim; 0 when nothing is live."""
    return _divide(_total(values, live), _count(values, live))


def ordered_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, (..., T) -> (...), bitwise the same for every number of threads.

    torch splits a full reduction of more than 32768 elements among its threads, so its rounding depends on their
    number. Here every sum has at most 1024 elements.
    """
    block = 1024
    values = values.contiguous()
    while values.shape[-1] > block:
        filled = torch.nn.functional.pad(values, (0, -values.shape[-1] % block))
        values = filled.unflatten(-1, (-1, block)).sum(-1)
    return values.sum(-1)


def upcast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All tensors cast to the dtype of the computation: float64 if one of them is float64, else float32."""
    dtypes = [tensor.dtype for tensor in tensors]
    if dtypes.count(torch.float32) == len(dtypes):
        return tensors
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return tuple(tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors)


def check_aggregation(op: str, values: torch.Tensor, aggregation: str, num_items: float | torch.Tensor | None) -> None:
    """Checks ``aggregation`` and ``num_items``, and that ``values`` have the shape that they need."""
    _checks.one_of(op, "aggregation", aggregation, AGGREGATIONS)
    if aggregation != "token-mean" and values.dim() != 2:
        raise ValueError(
            f"{op}: aggregation {aggregation!r} needs (B, T), one row a sequence; got shape {tuple(values.shape)}. "
            'Use "token-mean" for packed tokens.'
        )
    if num_items is None:
        return
    if isinstance(num_items, torch.Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"{op}: num_items must be a number or a 0-dim tensor; got shape {tuple(num_items.shape)}")
        if num_items.device != values.device:
            raise ValueError(f"{op}: num_items must be on {values.device}; got {num_items.device}")
    elif isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(f"{op}: num_items must be a number or a 0-dim tensor; got {type(num_items).__name__}")
    elif not 0 <= num_items < math.inf:
        raise ValueError(f"{op}: num_items must be a finite number >= 0; got {num_items!r}")


def _total(values: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    # where instead of a product with the mask, because NaN * 0 is NaN
    return ordered_sum((values if live is None else torch.where(live, values, 0.0)).reshape(-1))


def _count(values: torch.Tensor, live: torch.Tensor | None) -> float | torch.Tensor:
    return float(values.numel()) if live is None else live.sum()


def _divide(total: torch.Tensor, count: float | torch.Tensor) -> torch.Tensor:
    if isinstance(count, torch.Tensor):
        return (total / torch.where(count > 0, count, 1)).to(total.dtype)  # a float64 count would widen the result
    return total / (count if count > 0 else 1.0)
