"""The fold of linear_logprobs and linear_cross_entropy: float32 logits, fresh from their matrix product, give their
log-probs and become their gradient in place.
"""

import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED
from .gradients import empty_slopes, store_row_slopes, write_gradient
from .rows import GENERAL, ROWS, Rows, inverse_temperatures, lane_rows, load_rows, store_rows, target_logits
from .sums import finish_rows, join_segments, sum_rows


@triton.jit(do_not_specialize=GENERAL)
def _finish(
    count, vocab, targets, live, temperature, temperature_stride, softcap, logits, stride, parts, segments, logprobs,
    entropy, grad_logprobs, grad_entropy, slopes, CAPPED: tl.constexpr,
):  # fmt: skip
    row, alive = lane_rows(count, live)
    inverse_temperature = inverse_temperatures(row, alive, temperature, temperature_stride)
    target_logit = target_logits(row, alive, targets, vocab, logits, stride, softcap, CAPPED)
    weighted: tl.constexpr = entropy is not None or grad_entropy is not None
    sums = join_segments(row, alive, parts, count, segments, inverse_temperature, weighted)
    logprob, spread, shift, mass, scale, log_norm = finish_rows(*sums, target_logit, inverse_temperature)
    store_rows(logprobs, row, count, alive, logprob)
    store_rows(entropy, row, count, alive, spread)
    if slopes is not None:
        grad_logprob = tl.full((ROWS,), 1.0, tl.float32)
        if grad_logprobs is not None:
            grad_logprob = load_rows(grad_logprobs, row, alive)
        store_row_slopes(
            slopes, row, count, alive, shift, mass, scale, log_norm, target_logit, inverse_temperature, logprob,
            spread, grad_logprob, load_rows(grad_entropy, row, alive), softcap, CAPPED,
        )  # fmt: skip


def linear_logprobs(
    count: int,
    vocab: int,
    targets: Tensor,
    live: Tensor | None,
    temperature: Tensor,
    temperature_stride: int,
    softcap: float,
    threads: int,
    logits: Tensor,
    stride: int,
    logprobs: Tensor,
    entropy: Tensor | None,
    grad: Tensor | None,
    grad_dtype: int,
    grad_stride: int,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    rows = Rows(count, vocab, targets, live, temperature, temperature_stride, softcap)
    parts = sum_rows(rows, logits, stride, weighted=entropy is not None or grad_entropy is not None)
    slopes = empty_slopes(rows, logits.device) if grad is not None else None
    _finish[rows.lanes()](
        *rows, logits, stride, parts, rows.segments(), logprobs, entropy, grad_logprobs, grad_entropy, slopes,
        CAPPED=softcap != 0, **FUSED,
    )  # fmt: skip
    if grad is not None and slopes is not None:
        write_gradient(rows, logits, stride, slopes, grad, grad_stride, vocab, sloped=grad_entropy is not None)
