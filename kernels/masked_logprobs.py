"""log softmax(logits)[target] and the entropy: one read of the logits forward, one backward.

formula         log p_t = -softplus(d), d = logsumexp_{j != t} x_j - x_t (rlhf_fast/ops/_vocab.py)
bytes a row     of V columns of b bytes: forward V b read, 20 to 24 written; backward V b read, V b written
passes          one each way
error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
"""

from .extras import store_outputs, write_extras
from .gradients import empty_slopes, store_row_slopes, write_gradient
from .launch import kernel, launch
from .numbers import FAR, at_most
from .records import MaskedLogprobs, MaskedLogprobsBackward
from .rows import (
    GENERAL,
    by_batch,
    grid_of_rows,
    inverse_temperatures,
    lanes_of_program,
    load_rows,
    row_arguments,
    segments_of,
    store_rows,
    target_logits,
)
from .sums import RowResult, finish_rows, join_segments, sum_rows


@kernel(general=GENERAL)
def _finish(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, parts, segments,
    logprobs, entropy, logsumexp, extras, statistics,
):  # fmt: skip
    """Combines the segments of each row and writes its results."""
    lanes = lanes_of_program(length, live)
    inverse_temperature = inverse_temperatures(lanes, temperature, temperature_stride)
    target_logit = target_logits(lanes, targets, vocab, logits, logits_stride, softcap)
    sums = join_segments(lanes, parts, segments, inverse_temperature)
    result = finish_rows(sums, target_logit, inverse_temperature)
    outputs = (logprobs, entropy, logsumexp, extras)
    store_outputs(outputs, lanes, result, target_logit, sums.shift, inverse_temperature)
    store_rows(statistics, lanes, result.shift, STRIDE=4)
    store_rows(statistics + 1, lanes, result.others_mass, STRIDE=4)
    store_rows(statistics + 2, lanes, result.scale, STRIDE=4)
    store_rows(statistics + 3, lanes, at_most(result.log_norm, FAR), STRIDE=4)


@by_batch
def masked_logprobs(a: MaskedLogprobs) -> None:
    rows, logits = a.rows, a.logits
    launch(
        _finish,
        grid_of_rows(rows),
        **row_arguments(rows),
        logits=logits.data,
        logits_stride=logits.row_stride,
        parts=sum_rows(rows, logits),
        segments=segments_of(rows),
        **a.outputs._asdict(),
        statistics=a.statistics,
    )
    write_extras(rows, logits, a.outputs)


@kernel(general=GENERAL)
def _prepare(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, statistics, logprobs,
    entropy, grad_logprobs, grad_entropy, grad_logsumexp, slopes,
):  # fmt: skip
    """The slopes of each row, from the results and statistics of the forward."""
    lanes = lanes_of_program(length, live)
    result = RowResult(
        logprob=load_rows(logprobs, lanes),
        entropy=load_rows(entropy, lanes),
        shift=load_rows(statistics, lanes, STRIDE=4),
        others_mass=load_rows(statistics + 1, lanes, STRIDE=4),
        scale=load_rows(statistics + 2, lanes, STRIDE=4),
        log_norm=load_rows(statistics + 3, lanes, STRIDE=4),
    )
    store_row_slopes(
        slopes,
        lanes,
        result,
        target_logit=target_logits(lanes, targets, vocab, logits, logits_stride, softcap),
        softcap=softcap,
        inverse_temperature=inverse_temperatures(lanes, temperature, temperature_stride),
        grad_logprob=load_rows(grad_logprobs, lanes),
        grad_entropy=load_rows(grad_entropy, lanes),
        grad_logsumexp=load_rows(grad_logsumexp, lanes),
    )


@by_batch
def masked_logprobs_backward(a: MaskedLogprobsBackward) -> None:
    rows, logits = a.rows, a.logits
    slopes = empty_slopes(rows, a.logprobs.device)
    launch(
        _prepare,
        grid_of_rows(rows),
        **row_arguments(rows),
        logits=logits.data,
        logits_stride=logits.row_stride,
        statistics=a.statistics,
        logprobs=a.logprobs,
        entropy=a.entropy,
        grad_logprobs=a.grad_logprobs,
        grad_entropy=a.grad_entropy,
        grad_logsumexp=a.grad_logsumexp,
        slopes=slopes,
    )
    write_gradient(rows, logits, slopes, a.grad, a.columns)
