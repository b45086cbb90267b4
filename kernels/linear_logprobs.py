"""The fold of linear_logprobs and linear_cross_entropy: float32 logits, fresh from their matrix product, give their
log-probs and become their gradient in place.

    formula         as masked_logprobs; its gradient, p_j times a factor of the row, and the target set apart
    bytes a row     of V columns: 4 V read for the sums, 4 V read and at most 4 V written for the gradient
    passes          one, and one more for the gradient
    error           at most that of the plain float32 formula, against float64 (tests/ops/test_accuracy.py)
"""

import triton
import triton.language as tl

from .formulas import FUSED
from .gradients import empty_slopes, store_row_slopes, write_gradient
from .records import LinearLogprobs
from .rows import (
    GENERAL,
    ROWS,
    inverse_temperatures,
    lane_rows,
    lanes_of,
    load_rows,
    segments_of,
    store_rows,
    target_logits,
)
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


def linear_logprobs(a: LinearLogprobs) -> None:
    rows, logits = a.rows, a.logits
    parts = sum_rows(rows, logits, weighted=a.entropy is not None or a.grad_entropy is not None)
    slopes = empty_slopes(rows, a.logprobs.device) if a.grad.data is not None else None
    _finish[lanes_of(rows)](
        *rows, logits.data, logits.row_stride, parts, segments_of(rows), a.logprobs, a.entropy, a.grad_logprobs,
        a.grad_entropy, slopes, CAPPED=rows.softcap != 0, **FUSED,
    )  # fmt: skip
    if slopes is not None:
        write_gradient(rows, logits, slopes, a.grad, rows.vocab, sloped=a.grad_entropy is not None)
