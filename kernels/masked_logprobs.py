"""log softmax(logits)[target] and the entropy: the logits are read once forward, and once backward."""

import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED
from .gradients import empty_slopes, store_row_slopes, write_gradient
from .numbers import FAR, at_most
from .rows import GENERAL, Rows, inverse_temperatures, lane_rows, load_rows, store_rows, target_logits
from .sums import finish_rows, join_segments, sum_rows


@triton.jit(do_not_specialize=GENERAL)
def _finish(
    count, vocab, targets, live, temperature, temperature_stride, softcap, logits, stride, parts, segments, logprobs,
    entropy, statistics, CAPPED: tl.constexpr,
):  # fmt: skip
    row, alive = lane_rows(count, live)
    inverse_temperature = inverse_temperatures(row, alive, temperature, temperature_stride)
    target_logit = target_logits(row, alive, targets, vocab, logits, stride, softcap, CAPPED)
    shift, tops, rest, weighted = join_segments(
        row, alive, parts, count, segments, inverse_temperature, entropy is not None
    )
    logprob, spread, shift, mass, scale, log_norm = finish_rows(
        shift, tops, rest, weighted, target_logit, inverse_temperature
    )
    store_rows(logprobs, row, count, alive, logprob)
    store_rows(entropy, row, count, alive, spread)
    store_rows(statistics, row * 4, count * 4, alive, shift)
    store_rows(statistics + 1, row * 4, count * 4, alive, mass)
    store_rows(statistics + 2, row * 4, count * 4, alive, scale)
    store_rows(statistics + 3, row * 4, count * 4, alive, at_most(log_norm, FAR))


def masked_logprobs(
    count: int,
    vocab: int,
    targets: Tensor,
    live: Tensor | None,
    temperature: Tensor,
    temperature_stride: int,
    softcap: float,
    threads: int,
    logits: Tensor,
    dtype: int,
    stride: int,
    logprobs: Tensor,
    entropy: Tensor | None,
    statistics: Tensor,
) -> None:
    rows = Rows(count, vocab, targets, live, temperature, temperature_stride, softcap)
    parts = sum_rows(rows, logits, stride, entropy is not None)
    _finish[rows.lanes()](
        *rows, logits, stride, parts, rows.segments(), logprobs, entropy, statistics, CAPPED=softcap != 0, **FUSED
    )


@triton.jit(do_not_specialize=GENERAL)
def _prepare(
    count, vocab, targets, live, temperature, temperature_stride, softcap, logits, stride, statistics, logprobs,
    entropy, grad_logprobs, grad_entropy, slopes, CAPPED: tl.constexpr,
):  # fmt: skip
    row, alive = lane_rows(count, live)
    store_row_slopes(
        slopes,
        row,
        count,
        alive,
        load_rows(statistics, row * 4, alive),
        load_rows(statistics + 1, row * 4, alive),
        load_rows(statistics + 2, row * 4, alive),
        load_rows(statistics + 3, row * 4, alive),
        target_logits(row, alive, targets, vocab, logits, stride, softcap, CAPPED),
        inverse_temperatures(row, alive, temperature, temperature_stride),
        load_rows(logprobs, row, alive),
        load_rows(entropy, row, alive),
        load_rows(grad_logprobs, row, alive),
        load_rows(grad_entropy, row, alive),
        softcap,
        CAPPED,
    )


def masked_logprobs_backward(
    count: int,
    vocab: int,
    targets: Tensor,
    live: Tensor | None,
    temperature: Tensor,
    temperature_stride: int,
    softcap: float,
    threads: int,
    logits: Tensor,
    dtype: int,
    stride: int,
    columns: int,
    statistics: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad: Tensor,
    grad_stride: int,
) -> None:
    rows = Rows(count, vocab, targets, live, temperature, temperature_stride, softcap)
    slopes = empty_slopes(rows, logits.device)
    _prepare[rows.lanes()](
        *rows, logits, stride, statistics, logprobs, entropy, grad_logprobs, grad_entropy, slopes,
        CAPPED=softcap != 0, **FUSED,
    )  # fmt: skip
    write_gradient(rows, logits, stride, slopes, grad, grad_stride, columns, sloped=grad_entropy is not None)
