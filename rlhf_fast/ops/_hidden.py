"""What the ops between a layer's matrix products put into their launchers' records."""

from torch import Tensor

from rlhf_fast.kernels import records

from ._rows import unit_columns
from ._tokens import as_rows


def flat_rows(hidden: Tensor) -> Tensor:
    """(..., H) -> (N, H), whose columns lie side by side; copied where no row stride can say it."""
    return unit_columns(as_rows(hidden))


def hidden_of(rows: Tensor | None) -> records.Hidden:
    """Rows of ``flat_rows``, or None where they are not wanted."""
    return records.Hidden(None, 0) if rows is None else records.Hidden(rows, rows.stride(0))
