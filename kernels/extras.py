"""The outputs of a row that have no gradient: mean logit, log of the sum of squared probabilities, top-1.

They take one more sweep over the logits once the log-sum-exp is known, so that the first sweep has no variants.

formula         log sum_j p_j^2 = log sum_j e^(2 (x_j - peak)) - 2 (logsumexp - peak), peak = max_j x_j
bytes a row     of V columns of b bytes: V b read
passes          one
error           that of the log-prob, and of a sum in float32
"""

import torch
import triton
import triton.language as tl

from .launch import kernel, launch
from .numbers import LOG2E
from .records import EXTRAS, Logits, RowOutputs, Rows
from .rows import (
    BLOCK,
    GENERAL,
    SEGMENT,
    THREADS,
    WARPS,
    Row,
    block_columns,
    grid_of_rows,
    inverse_temperatures,
    lanes_of_program,
    load_block,
    load_rows,
    row_and_segment,
    row_arguments,
    segments_of,
    store_rows,
    temperature_of_row,
    thread_sum,
    vector,
)

STRIDE: tl.constexpr = tl.constexpr(EXTRAS)


@triton.jit
def store_outputs(outputs, lanes, result, target_logit, shift, inverse_temperature):
    """Writes logprob, entropy, logsumexp and is_top1. Leaves peak and logsumexp - peak in the places of the others.

    Args:
        outputs: the tensors of RowOutputs; each may be None.
        shift: the largest logit except the target's, -inf if there is no other.
    """
    logprobs, entropy, logsumexp, extras = outputs
    store_rows(logprobs, lanes, result.logprob)
    store_rows(entropy, lanes, result.entropy)
    if logsumexp is not None:
        leads = target_logit >= shift
        peak = tl.where(leads, target_logit, shift)
        above = tl.where(leads, -result.logprob, result.log_norm)  # logsumexp - peak
        value = peak * inverse_temperature + above
        store_rows(logsumexp, lanes, tl.where(result.logprob != result.logprob, result.logprob, value))
        store_rows(extras, lanes, peak, STRIDE=STRIDE)
        store_rows(extras + 1, lanes, tl.where(result.logprob != result.logprob, result.logprob, above), STRIDE=STRIDE)
        leads = leads & (result.logprob == result.logprob)
        store_rows(extras + 2, lanes, leads.to(tl.float32), STRIDE=STRIDE)


@kernel(general=GENERAL)
def _sum_segments(
    length, vocab, targets, live, temperature, temperature_stride, softcap, logits, logits_stride, extras, parts,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """parts (3, segments, length): of each segment the sums of e^(2 gap) and of x, and the number of columns > -inf."""
    index, segment = row_and_segment(vocab)
    if live is not None:
        if tl.load(live + index) == 0:
            return
    rate = LOG2E / temperature_of_row(temperature, temperature_stride, index)
    row = Row(logits + tl.multiple_of(index * logits_stride, VECTOR), vocab, -1, softcap)
    columns = block_columns(VECTOR)
    peak = tl.load(extras + index * STRIDE)
    squares = tl.zeros((THREADS,), tl.float32)
    total, finite = squares, squares
    start = segment * SEGMENT
    for at in range(start, tl.minimum(start + SEGMENT, vocab), BLOCK):
        x = load_block(row, at, columns)
        present = x != -float("inf")  # of NaN too
        squares += thread_sum(tl.exp2((x - peak) * (2.0 * rate)))
        total += thread_sum(tl.where(present, x, 0.0))
        finite += thread_sum(tl.where(present, 1.0, 0.0))
    part = parts + segment.to(tl.int64) * length + index
    field = tl.num_programs(0).to(tl.int64)  # segments * length
    tl.store(part, tl.sum(squares, axis=0))
    tl.store(part + field, tl.sum(total, axis=0))
    tl.store(part + 2 * field, tl.sum(finite, axis=0))


@kernel(general=GENERAL)
def _finish(length, vocab, live, temperature, temperature_stride, parts, segments, extras):
    """Combines the segments of each row and writes its mean logit and log of squares."""
    lanes = lanes_of_program(length, live)
    inverse_temperature = inverse_temperatures(lanes, temperature, temperature_stride)
    above = load_rows(extras + 1, lanes, STRIDE=STRIDE)
    squares = tl.zeros(above.shape, tl.float32)
    total, finite = squares, squares
    field = segments.to(tl.int64) * lanes.length
    part = parts + lanes.row
    for _ in range(segments):
        squares += tl.load(part, mask=lanes.alive, other=1.0)
        total += tl.load(part + field, mask=lanes.alive, other=0.0)
        finite += tl.load(part + 2 * field, mask=lanes.alive, other=0.0)
        part += lanes.length
    mean = tl.where(finite == vocab, total * inverse_temperature / vocab, -float("inf"))
    store_rows(extras, lanes, tl.where(above != above, above, mean), STRIDE=STRIDE)
    store_rows(extras + 1, lanes, tl.log(squares) - 2.0 * above, STRIDE=STRIDE)


def write_extras(rows: Rows, logits: Logits, outputs: RowOutputs) -> None:
    """Completes ``outputs.extras`` after ``store_outputs``. Does nothing if they are not wanted."""
    extras = outputs.extras
    if extras is None:
        return
    segments, arguments = segments_of(rows), row_arguments(rows)
    parts = torch.empty(EXTRAS, segments, rows.length, dtype=torch.float32, device=extras.device)
    launch(
        _sum_segments,
        (rows.length * segments,),
        **arguments,
        logits=logits.data,
        logits_stride=logits.row_stride,
        extras=extras,
        parts=parts,
        VECTOR=vector(logits),
        num_warps=WARPS,
    )
    launch(
        _finish,
        grid_of_rows(rows),
        **{name: arguments[name] for name in _finish.names if name in arguments},
        parts=parts,
        segments=segments,
        extras=extras,
    )
