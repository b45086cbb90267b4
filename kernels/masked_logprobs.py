"""log softmax(logits)[target] and the entropy: the logits are read once forward, and once backward.

formula         log p_t = -softplus(d), d = logsumexp_{j != t} x_j - x_t (rlhf_fast/ops/_vocab.py)
bytes a row     of V columns of b bytes: forward V b read, 20 to 24 written; backward V b read, V b written
passes          one each way
error           at most that of the plain float32 formula, against float64 (tests/ops/test_accuracy.py)
"""

import triton
import triton.language as tl

from .formulas import FUSED
from .gradients import empty_slopes, store_row_slopes, write_gradient
from .numbers import FAR, at_most
from .records import MaskedLogprobs, MaskedLogprobsBackward
from .rows import (
    GENERAL,
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


def masked_logprobs(a: MaskedLogprobs) -> None:
    rows, logits = a.rows, a.logits
    parts = sum_rows(rows, logits, a.entropy is not None)
    _finish[lanes_of(rows)](
        *rows, logits.data, logits.row_stride, parts, segments_of(rows), a.logprobs, a.entropy, a.statistics,
        CAPPED=rows.softcap != 0, **FUSED,
    )  # fmt: skip


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


def masked_logprobs_backward(a: MaskedLogprobsBackward) -> None:
    rows, logits = a.rows, a.logits
    slopes = empty_slopes(rows, a.logprobs.device)
    _prepare[lanes_of(rows)](
        *rows, logits.data, logits.row_stride, a.statistics, a.logprobs, a.entropy, a.grad_logprobs, a.grad_entropy,
        slopes, CAPPED=rows.softcap != 0, **FUSED,
    )  # fmt: skip
    write_gradient(rows, logits, slopes, a.grad, a.columns, sloped=a.grad_entropy is not None)
