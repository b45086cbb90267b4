"""PPO's joint loss, its gradients and its statistics in one launch. Without values it is the clipped policy loss, and
without log-probs the clipped value loss.

A program reads each input of its tile once and writes the gradients; the last program adds the parts of the loss. A
launch before counts the tokens or sequences, if the divisor of the loss is neither given nor the same for every mask;
another one computes ratios per sequence.

    formula         max(-A r, -A clip(r)) + value_coef (v - R)^2 / 2, clipped, + kl_coef KL - entropy_coef H
    bytes a token   4 read of each given tensor, 1 of a mask; 4 written of each gradient. Backward: 8 of each gradient
                    where the gradient of the loss is not 1
    passes          one; one more before it for a count, and one for ratios per sequence; one in the backward
    error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
"""

import torch
import triton
import triton.language as tl

from .formulas import bounded_log_ratio, exponential, kernel_terms, kl_value, policy_token, value_token
from .formulas import kl_slope as slope_of_kl
from .launch import kernel, launch
from .records import PpoLoss, PpoLossBackward
from .ticket import ticket_of
from .tokens import (
    TILE,
    WARPS,
    Divisor,
    is_last,
    live_at,
    load_kept,
    load_part,
    reciprocal,
    sequence_at,
    store_part,
    tile_moments,
    tile_of,
    tile_of_tokens,
    token_share,
)

# Parts per load of the last program: few, because it keeps about ten numbers of each part in registers.
PARTS = tl.constexpr(256)
# The rows of the table of parts. PEAK, MEAN and DEVIATION (sum of squared deviations) are those of a tile's ratios.
COUNT, POLICY, CLIPPED, SQUARED, PEAK, MEAN, DEVIATION, KL, ENTROPY, VALUE, VALUE_CLIPPED = map(tl.constexpr, range(11))
ROWS = 11


@kernel(general=("length", "ratios", "items", "loss", "statistics", "parts", "ticket"), ours=("lengths",))
def _evaluate(
    tokens, length, logprobs, old_logprobs, advantages, values, old_values, returns, entropy, ref_logprobs,
    live, ratios, terms, value_terms, lengths, items, norm, loss, statistics, grad_logprobs, grad_values, grad_entropy,
    parts, ticket, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients and the parts of one tile; in the last program the loss and the statistics too."""
    index = tile_of_tokens(TILE)
    inside = index < tokens
    counted = live_at(live, index, inside)
    weight = token_share(items, norm, lengths, index, tokens, length, inside)
    # 1. All loads, before the first sum: a sum contains a barrier, for which later loads would wait.
    if logprobs is not None:
        logprob = load_kept(logprobs, index, inside, counted)
        old_logprob = load_kept(old_logprobs, index, inside, counted)
        advantage = load_kept(advantages, index, inside, counted)
    if ref_logprobs is not None:
        ref_logprob = load_kept(ref_logprobs, index, inside, counted)
    if entropy is not None:
        spread = load_kept(entropy, index, inside, counted)
    if values is not None:
        value = load_kept(values, index, inside, counted)
        old_value = load_kept(old_values, index, inside, counted)
        target = load_kept(returns, index, inside, counted)

    # 2. The policy, with KL and entropy. Every sum over the tile is stored as a part.
    store_part(parts, COUNT, tl.sum(counted.to(tl.float32)))
    if logprobs is not None:
        log_ratio = logprob - old_logprob
        bounded = bounded_log_ratio(log_ratio)
        if ratios is None:
            ratio = exponential(bounded)
        else:
            ratio = tl.load(ratios + sequence_at(index, tokens, length), mask=inside, other=0.0)
        ratio = tl.where(counted, ratio, 0.0)
        policy_loss, slope, clipped = policy_token(log_ratio, ratio, advantage, terms)
        if ref_logprobs is not None:
            difference = logprob - ref_logprob
            store_part(parts, KL, tl.sum(kl_value(difference, terms.kl) * weight))
            if terms.kl_slope is not None:
                slope += terms.kl_coef * slope_of_kl(difference, terms.kl_slope)
        if grad_logprobs is not None:
            tl.store(grad_logprobs + index, tl.where(counted, slope * weight, 0.0), mask=inside)
        _, near, off, deviation = tile_moments(ratio, counted)
        store_part(parts, POLICY, tl.sum(policy_loss * weight))
        store_part(parts, CLIPPED, tl.sum(clipped.to(tl.float32)))
        store_part(parts, SQUARED, tl.sum(bounded * bounded))
        store_part(parts, PEAK, tl.max(ratio))
        store_part(parts, MEAN, near + off)
        store_part(parts, DEVIATION, deviation)
    if entropy is not None:
        store_part(parts, ENTROPY, tl.sum(spread * weight))
        if grad_entropy is not None:
            tl.store(grad_entropy + index, tl.where(counted, -terms.entropy_coef * weight, 0.0), mask=inside)
    # 3. The value.
    if values is not None:
        value_loss, value_slope, value_clipped = value_token(value, old_value, target, value_terms)
        if grad_values is not None:
            value_slope *= value_terms.coef
            tl.store(grad_values + index, tl.where(counted, value_slope * weight, 0.0), mask=inside)
        store_part(parts, VALUE, tl.sum(value_loss * weight))
        store_part(parts, VALUE_CLIPPED, tl.sum(value_clipped.to(tl.float32)))

    # 4. The last program of the launch adds the parts.
    if is_last(ticket):
        _finish(
            parts,
            logprobs=logprobs,
            values=values,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            terms=terms,
            value_terms=value_terms,
            loss=loss,
            statistics=statistics,
        )


@triton.jit
def _finish(
    parts, logprobs, values, entropy, ref_logprobs, terms, value_terms, loss, statistics,
):  # fmt: skip
    """Adds the parts, and writes loss and statistics. The tensors are used only to test whether they are None."""
    # 1. Sums per lane: lane i adds the tiles i, i + PARTS, ... in order.
    zero = tl.zeros((PARTS,), tl.float64)
    count, total, squares, peak = zero, zero, zero, zero  # of the ratios
    policy, kl, spread, value = zero, zero, zero, zero
    clipped, squared, value_clipped = zero, zero, zero
    tiles = tl.num_programs(0)
    for start in range(0, tiles, PARTS):
        tile = start + tl.arange(0, PARTS)
        counts = load_part(parts, COUNT, tiles, tile)
        count += counts
        if logprobs is not None:
            policy += load_part(parts, POLICY, tiles, tile)
            clipped += load_part(parts, CLIPPED, tiles, tile)
            squared += load_part(parts, SQUARED, tiles, tile)
            peak = tl.maximum(peak, load_part(parts, PEAK, tiles, tile))
            means = load_part(parts, MEAN, tiles, tile)
            total += counts * means
            squares += counts * means * means + load_part(parts, DEVIATION, tiles, tile)
        if ref_logprobs is not None:
            kl += load_part(parts, KL, tiles, tile)
        if entropy is not None:
            spread += load_part(parts, ENTROPY, tiles, tile)
        if values is not None:
            value += load_part(parts, VALUE, tiles, tile)
            value_clipped += load_part(parts, VALUE_CLIPPED, tiles, tile)

    # 2. Sums over the lanes. float64 is accurate enough for E[x^2] - E[x]^2.
    live_tokens = tl.sum(count)
    inverse = reciprocal(tl.maximum(live_tokens, 1.0))
    policy_loss, value_loss = tl.sum(policy), tl.sum(value)
    kl_loss, entropy_loss = tl.sum(kl), tl.sum(spread)
    mean = tl.sum(total) * inverse
    variance = tl.sum(squares) * inverse - mean * mean

    # 3. Writes the loss, and the statistics in the order of PpoLoss in records.py.
    joint = policy_loss + _term(value_terms.coef, value_loss) + _term(terms.kl_coef, kl_loss)
    tl.store(loss, (joint - _term(terms.entropy_coef, entropy_loss)).to(tl.float32))
    if logprobs is not None and values is not None:
        tl.store(statistics, policy_loss.to(tl.float32))
        tl.store(statistics + 1, value_loss.to(tl.float32))
        tl.store(statistics + 2, kl_loss.to(tl.float32))
        tl.store(statistics + 3, entropy_loss.to(tl.float32))
        statistics += 4
    if logprobs is not None:
        tl.store(statistics, (tl.sum(clipped) * inverse).to(tl.float32))
        tl.store(statistics + 1, (0.5 * tl.sum(squared) * inverse).to(tl.float32))
        tl.store(statistics + 2, mean.to(tl.float32))
        # tl.max may ignore a NaN; the mean does not
        tl.store(statistics + 3, tl.where(mean == mean, tl.max(peak), mean).to(tl.float32))
        tl.store(statistics + 4, tl.where(variance < 0.0, 0.0, variance).to(tl.float32))
        statistics += 5
    if values is not None:
        tl.store(statistics, (tl.sum(value_clipped) * inverse).to(tl.float32))


@triton.jit
def _term(coef, value):
    """A term with coefficient 0 adds 0, even if it is infinite."""
    return tl.where(coef != 0.0, coef * value, 0.0)


@kernel(general=("ratios",))
def _sequence_ratio(logprobs, old_logprobs, live, ratios, length, TILE: tl.constexpr):
    """exp of the mean log ratio over the live tokens of a sequence, one sequence per program."""
    sequence = tl.program_id(0).to(tl.int64)
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.float64)
    for start in range(0, length, TILE):
        offset = start + tl.arange(0, TILE)
        inside = offset < length
        index = sequence * length + offset
        counted = live_at(live, index, inside)
        log_ratio = load_kept(logprobs, index, inside, counted) - load_kept(old_logprobs, index, inside, counted)
        total += tl.sum(bounded_log_ratio(log_ratio)).to(tl.float64)
        count += tl.sum(counted.to(tl.float32)).to(tl.float64)
    tl.store(ratios + sequence, exponential((total / tl.maximum(count, 1.0)).to(tl.float32)))


def ppo_loss(a: PpoLoss) -> None:
    device, tokens = a.loss.device, a.sequences * a.length
    ratios = torch.empty(a.sequences, dtype=torch.float32, device=device) if a.sequence_level else None
    if ratios is not None and a.sequences > 0:
        launch(
            _sequence_ratio,
            (a.sequences,),
            logprobs=a.logprobs,
            old_logprobs=a.old_logprobs,
            live=a.live,
            ratios=ratios,
            length=a.length,
            TILE=tile_of(a.length),
        )
    divisor = Divisor(a.sequences, a.length, a.live, a.divisor, device)
    tiles = max(triton.cdiv(tokens, TILE), 1)
    parts = torch.empty(ROWS * tiles, dtype=torch.float32, device=device)
    launch(
        _evaluate,
        (tiles,),
        tokens=tokens,
        length=max(a.length, 1),
        logprobs=a.logprobs,
        old_logprobs=a.old_logprobs,
        advantages=a.advantages,
        values=a.values,
        old_values=a.old_values,
        returns=a.returns,
        entropy=a.entropy,
        ref_logprobs=a.ref_logprobs,
        live=a.live,
        ratios=ratios,
        terms=kernel_terms(a.terms),
        value_terms=a.value_terms,
        lengths=divisor.lengths,
        items=divisor.items,
        norm=divisor.norm,
        loss=a.loss,
        statistics=a.statistics,
        grad_logprobs=a.grad_logprobs,
        grad_values=a.grad_values,
        grad_entropy=a.grad_entropy,
        parts=parts,
        ticket=ticket_of(device),
        TILE=TILE,
        num_warps=WARPS,
    )


@kernel(general=("grad_loss",))
def _scale(elements, grad_loss, grads, TILE: tl.constexpr):
    scale = tl.load(grad_loss)
    if scale != 1.0:
        index = tile_of_tokens(TILE)
        inside = index < elements
        tl.store(grads + index, tl.load(grads + index, mask=inside) * scale, mask=inside)


def ppo_loss_backward(a: PpoLossBackward) -> None:
    launch(
        _scale,
        (triton.cdiv(a.elements, TILE),),
        elements=a.elements,
        grad_loss=a.grad_loss,
        grads=a.grads,
        TILE=TILE,
        num_warps=WARPS,
    )
