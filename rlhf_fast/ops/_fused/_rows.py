"""What the vocabulary-level launchers have in common."""

import torch
from torch import Tensor

from .._native import dtype_code

STATISTICS = 4  # floats a row, kStatistics in csrc/rlhf_fast.h


def rows_arguments(
    rows: int, vocab: int, targets: Tensor | None, live: Tensor | None, temperature: Tensor, softcap: float
) -> tuple[object, ...]:
    """The launchers' leading arguments; softcap 0 stands for none."""
    return (
        rows,
        vocab,
        None if targets is None else targets.contiguous(),
        None if live is None else live.contiguous(),
        temperature,
        temperature.stride(0),
        softcap,
        torch.get_num_threads(),
    )


def unit_columns(logits: Tensor) -> Tensor:
    """Logits (N, V) whose columns lie side by side, copied where they do not; rows may have any stride."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def logits_arguments(logits: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if logits is None else (logits, dtype_code(logits.dtype), logits.stride(0))
