"""What the vocabulary-level ops put into their launchers' records."""

from torch import Tensor

from rlhf_fast.kernels import records

_DTYPES = {dtype: code for code, dtype in enumerate(records.DTYPES)}
NOTHING = records.Logits(data=None, dtype=0, row_stride=0)


def rows_of(
    length: int,
    targets: Tensor | None,
    live: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    *,
    vocab: int,
    softcap: float,
) -> records.Rows:
    return records.Rows(
        length=length,
        vocab=vocab,
        targets=None if targets is None else targets.contiguous(),
        live=None if live is None else live.contiguous(),
        temperatures=temperatures,
        temperature_stride=0 if temperatures is None else temperatures.stride(0),
        temperature=temperature,
        softcap=softcap,
    )


def logits_of(logits: Tensor) -> records.Logits:
    """Logits (N, V), or their gradient, whose columns lie side by side."""
    return records.Logits(logits, dtype_code(logits), logits.stride(0))


def unit_columns(logits: Tensor) -> Tensor:
    """Logits (N, V) whose columns lie side by side, copied where they do not; rows may have any stride."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def dtype_code(data: Tensor) -> int:
    return _DTYPES[data.dtype]
