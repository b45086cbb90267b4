"""linear_logprobs and linear_cross_entropy: the fold of a chunk of float32 logits (rlhf_fast/ops/_sweep.py).

Computes the log-probs of the rows, then overwrites their logits with the gradient.

    formula         as masked_logprobs; the gradient is p_j times a factor of the row, except at the target
    bytes a row     of V columns: 4 V read for the sums, 4 V read and at most 4 V written for the gradient
    passes          one, and one more for the gradient
    error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
"""

import triton.language as tl

from .extras import store_outputs, write_extras
from .gradients import empty_slopes, store_row_slopes, write_gradient
from .launch import kernel, launch
from .records import LinearLogprobs
from .rows import (
    GENERAL,
    ROWS,
    grid_of_rows,
    inverse_temperatures,
    lanes_of_program,
    load_rows,
    row_arguments,
    segments_of,
    target_logits,
)
from .sums import finish_rows, join_segments, sum_rows


@kernel(general=GENERAL)
def _finish(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, parts, segments,
    logprobs, entropy, logsumexp, extras, grad_logprobs, grad_entropy, grad_logsumexp, slopes,
):  # fmt: skip
    """Combines the segments of each row, writes its results and, if a gradient is wanted, its slopes.

    Reads the target's logit before the gradient overwrites it.
    """
    lanes = lanes_of_program(length, live)
    inverse_temperature = inverse_temperatures(lanes, temperature, temperature_stride)
    target_logit = target_logits(lanes, targets, vocab, logits, logits_stride, softcap)
    sums = join_segments(lanes, parts, segments, inverse_temperature)
    result = finish_rows(sums, target_logit, inverse_temperature)
    outputs = (logprobs, entropy, logsumexp, extras)
    store_outputs(outputs, lanes, result, target_logit, sums.shift, inverse_temperature)
    if slopes is not None:
        grad_logprob = tl.full((ROWS,), 1.0, tl.float32)
        if grad_logprobs is not None:
            grad_logprob = load_rows(grad_logprobs, lanes)
        store_row_slopes(
            slopes,
            lanes,
            result,
            target_logit=target_logit,
            softcap=softcap,
            inverse_temperature=inverse_temperature,
            grad_logprob=grad_logprob,
            grad_entropy=load_rows(grad_entropy, lanes),
            grad_logsumexp=load_rows(grad_logsumexp, lanes),
        )


def linear_logprobs(a: LinearLogprobs) -> None:
    rows, logits = a.rows, a.logits
    slopes = empty_slopes(rows, a.outputs.logprobs.device) if a.grad.data is not None else None
    launch(
        _finish,
        grid_of_rows(rows),
        **row_arguments(rows),
        logits=logits.data,
        logits_stride=logits.row_stride,
        parts=sum_rows(rows, logits),
        segments=segments_of(rows),
        **a.outputs._asdict(),
        grad_logprobs=a.grad_logprobs,
        grad_entropy=a.grad_entropy,
        grad_logsumexp=a.grad_logsumexp,
        slopes=slopes,
    )
    write_extras(rows, logits, a.outputs)
    if slopes is not None:
        write_gradient(rows, logits, slopes, a.grad, rows.vocab)
