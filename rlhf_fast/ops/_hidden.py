"""What the ops between a layer's matrix products put into their launchers' records."""

from torch import Tensor

from rlhf_fast.kernels import records

from ._rows import unit_columns


def flat_rows(hidden: Tensor) -> Tensor:
    """(..., H) -> (N, H), whose columns lie side by side; copied where no row stride can say it."""
    if hidden.dim() < 2:
        return unit_columns(hidden.reshape(1, -1))
    return unit_columns(hidden if hidden.dim() == 2 else hidden.flatten(0, -2))


def hidden_of(rows: Tensor | None) -> records.Hidden:
    """Rows of ``flat_rows``, or None where they are not wanted."""
    return records.Hidden(None, 0) if rows is None else records.Hidden(rows, rows.stride(0))
