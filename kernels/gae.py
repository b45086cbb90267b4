"""Generalised advantage estimation: a scan over each sequence from its end.

The recurrence carries one number g from a token to the one before it (``gae_gain``). A run of consecutive tokens maps
the g after it linearly to its own: g = rate * later + gain. Two neighbouring runs compose to another linear function,
and composition is associative, so a parallel scan computes all of them. A masked token is the identity.

A program takes several short sequences or one long one. It scans a long one in blocks, from the last to the first, and
passes the carry on. A padded sequence of more than SPLIT tokens has one program per block: a first kernel computes the
function of each block, and in the second each program computes its carry from the functions of the later blocks. The
blocks of a sequence depend only on its own length.

    formula         A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}, over the live tokens
    bytes a token   8 read, 1 more with a mask; 8 written
    passes          one; a sequence that is split among programs is read twice; whitening follows; bounds of packed
                    sequences are checked by a launch before
    error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .formulas import gae_gain
from .launch import kernel, launch
from .masked_whiten import masked_whiten
from .records import Gae, MaskedWhiten
from .tokens import live_at, load_kept

BLOCK = 1024
SPLIT = 4 * BLOCK
WARPS = 4


class Block(NamedTuple):
    """The tokens of a block of one or several sequences, (ROWS, BLOCK) each."""

    index: tl.tensor
    inside: tl.tensor  # whether the token exists
    counted: tl.tensor  # whether it counts
    reward: tl.tensor
    value: tl.tensor
    rate: tl.tensor  # the linear function of the token
    gain: tl.tensor


# The scans run from the end (reverse), so the first arguments of a join belong to the later run.
@triton.jit
def _join(later_rate, later_gain, rate, gain):
    return later_rate * rate, gain + rate * later_gain


@triton.jit
def _join_with_advantage(later_rate, later_gain, later_slope, later_base, rate, gain, slope, base):
    """Composes two runs, and also the advantage of the run's first token: slope * later + base.

    The advantage is not the carried number, but it is linear in the same ``later``. Two more registers per token in the
    scan save a second read of the tokens.
    """
    joined_rate, joined_gain = _join(later_rate, later_gain, rate, gain)
    return joined_rate, joined_gain, slope * later_rate, base + slope * later_gain


@triton.jit
def _load_block(rewards, values, live, start, size, block, gamma_lam, gamma_rest, BLOCK: tl.constexpr):
    """Block number ``block`` of each sequence. The sequences start at ``start`` and have ``size`` tokens."""
    column = tl.arange(0, BLOCK)[None, :]
    index = start + block * BLOCK + column
    # A 32-bit comparison is cheaper. Columns are below BLOCK, so the bound can be clamped to 2 * BLOCK.
    inside = tl.broadcast_to(column < tl.minimum(size - block * BLOCK, 2 * BLOCK).to(tl.int32), index.shape)
    counted = live_at(live, index, inside)
    reward = load_kept(rewards, index, inside, counted)
    value = load_kept(values, index, inside, counted)
    rate = tl.where(counted, gamma_lam, 1.0)
    gain = tl.where(counted, gae_gain(reward, value, gamma_lam, gamma_rest), 0.0)
    return Block(index=index, inside=inside, counted=counted, reward=reward, value=value, rate=rate, gain=gain)


@triton.jit
def _first(x):
    """The first column of each row. Triton cannot index a tensor, so this sums the row with the other columns as 0."""
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == 0, x, 0.0), 1)


@kernel(general=("blocks", "block_rates", "block_gains"))
def _measure(
    rewards, values, live, length, blocks, gamma_lam, gamma_rest, block_rates, block_gains, BLOCK: tl.constexpr
):
    """Writes the linear function of one block of a sequence of ``length`` tokens."""
    sequence = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    tokens = _load_block(
        rewards,
        values,
        live,
        start=sequence * length,
        size=length,
        block=block,
        gamma_lam=gamma_lam,
        gamma_rest=gamma_rest,
        BLOCK=BLOCK,
    )
    rate, gain = tl.associative_scan((tokens.rate, tokens.gain), 1, _join, reverse=True)
    place = sequence * blocks + block + tl.arange(0, 1)
    tl.store(block_rates + place, _first(rate))
    tl.store(block_gains + place, _first(gain))


@kernel(general=("cu_seqlens", "sequences", "tokens", "wrong"))
def _check_bounds(cu_seqlens, sequences, tokens, wrong, BLOCK: tl.constexpr):
    """Writes 1 if cu_seqlens does not start at 0, decreases or does not end at ``tokens``, else 0."""
    found = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, sequences, BLOCK):
        i = tl.minimum(at + tl.arange(0, BLOCK), sequences - 1)
        start = tl.load(cu_seqlens + i)
        stop = tl.load(cu_seqlens + i + 1)
        bad = (start > stop) | ((i == 0) & (start != 0)) | ((i == sequences - 1) & (stop != tokens))
        found |= bad.to(tl.int32)
    tl.store(wrong, tl.max(found))


@triton.jit
def _write_nan(advantages, returns, start, stop, BLOCK: tl.constexpr):
    for at in range(start, stop, BLOCK):
        index = at + tl.arange(0, BLOCK)
        nan = tl.full((BLOCK,), float("nan"), tl.float32)
        tl.store(advantages + index, nan, mask=index < stop)
        tl.store(returns + index, nan, mask=index < stop)


@kernel(general=("cu_seqlens", "wrong", "sequences", "tokens", "blocks", "block_rates", "block_gains"))
def _sweep(
    rewards,
    values,
    live,
    cu_seqlens,
    wrong,
    sequences,
    length,
    tokens,
    gamma_lam,
    gamma_rest,
    block_rates,
    block_gains,
    blocks,
    advantages,
    returns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Scans whole sequences or, given the functions of all blocks, one block. BLOCKS: a power of 2, >= ``blocks``."""
    # 1. The sequences of this program.
    if cu_seqlens is None:
        # Rows past the last sequence compute it again and write the same numbers, which is cheaper than masks.
        sequence = tl.minimum(tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), sequences - 1)[:, None]
        start = sequence * length
        size = length
    else:
        bound = cu_seqlens + tl.program_id(0)
        start = tl.load(bound)
        size = tl.load(bound + 1) - start
        # Wrong bounds: no sequence has tokens, and each program writes NaN to its share of all of them. A branch around
        # this would take twice the registers.
        is_wrong = tl.load(wrong) != 0
        size = tl.where(is_wrong, 0, size)
        share = tl.cdiv(tokens, sequences).to(tl.int64)
        first_nan = tl.program_id(0) * share
        stop = tl.where(is_wrong, tl.minimum(first_nan + share, tokens), first_nan)
        _write_nan(advantages, returns, first_nan, stop, BLOCK)
    # 2. The blocks of this program, and the carry into the last of them.
    if block_rates is None:
        first = 0
        last = tl.cdiv(size, BLOCK)
        carry = tl.zeros((ROWS,), tl.float32)
    else:
        # One block. Its carry comes from composing the functions of the later blocks, (1, BLOCKS), with carry 0.
        first = tl.program_id(1)
        last = first + 1
        other = tl.arange(0, BLOCKS)[None, :]
        after = (other > first) & (other < blocks)
        functions = (
            tl.load(block_rates + sequence * blocks + other, mask=after, other=1.0),
            tl.load(block_gains + sequence * blocks + other, mask=after, other=0.0),
        )
        carry = _first(tl.associative_scan(functions, 1, _join, reverse=True)[1])
    # 3. From the last block to the first: scan, write, and pass the carry on.
    for done in range(first, last):
        block = _load_block(
            rewards,
            values,
            live,
            start=start,
            size=size,
            block=first + last - 1 - done,
            gamma_lam=gamma_lam,
            gamma_rest=gamma_rest,
            BLOCK=BLOCK,
        )
        slope = tl.full(block.rate.shape, 1.0, tl.float32)
        base = block.reward - block.value
        rate, gain, slope, base = tl.associative_scan(
            (block.rate, block.gain, slope, base), 1, _join_with_advantage, reverse=True
        )
        advantage = tl.where(block.counted, base + slope * carry[:, None], 0.0)
        tl.store(advantages + block.index, advantage, mask=block.inside)
        tl.store(returns + block.index, advantage + block.value, mask=block.inside)
        carry = _first(gain + rate * carry[:, None])


def gae(a: Gae) -> None:
    tokens = a.rewards.numel()
    if tokens == 0:
        return
    if a.sequences == 0:  # wrong cu_seqlens: tokens that belong to no sequence
        a.advantages.fill_(float("nan"))
        a.returns.fill_(float("nan"))
        return
    # Packed sequences all have the same block size, so that no result depends on the length of another sequence.
    block = BLOCK if a.cu_seqlens is not None else min(max(triton.next_power_of_2(a.length), 32), BLOCK)
    rows = BLOCK // block
    gamma_lam, gamma_rest = a.gamma * a.lam, a.gamma - a.gamma * a.lam
    blocks = triton.cdiv(a.length, BLOCK) if a.cu_seqlens is None and a.length > SPLIT else 1
    wrong = rates = gains = None
    if a.cu_seqlens is not None:
        wrong = torch.empty((), dtype=torch.int32, device=a.rewards.device)
        launch(
            _check_bounds,
            (1,),
            cu_seqlens=a.cu_seqlens,
            sequences=a.sequences,
            tokens=tokens,
            wrong=wrong,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    if blocks > 1:
        rates, gains = torch.empty((2, a.sequences, blocks), dtype=torch.float32, device=a.rewards.device)
        launch(
            _measure,
            (a.sequences, blocks),
            rewards=a.rewards,
            values=a.values,
            live=a.live,
            length=a.length,
            blocks=blocks,
            gamma_lam=gamma_lam,
            gamma_rest=gamma_rest,
            block_rates=rates,
            block_gains=gains,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    launch(
        _sweep,
        (triton.cdiv(a.sequences, rows), blocks),
        rewards=a.rewards,
        values=a.values,
        live=a.live,
        cu_seqlens=a.cu_seqlens,
        wrong=wrong,
        sequences=a.sequences,
        length=a.length,
        tokens=tokens,
        gamma_lam=gamma_lam,
        gamma_rest=gamma_rest,
        block_rates=rates,
        block_gains=gains,
        blocks=blocks,
        advantages=a.advantages,
        returns=a.returns,
        ROWS=rows,
        BLOCK=block,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=WARPS,
    )
    if a.whiten:
        statistics = torch.empty(3, dtype=torch.float64, device=a.rewards.device)
        masked_whiten(
            MaskedWhiten(
                elements=tokens,
                x=a.advantages,
                live=a.live,
                shift_mean=True,
                unbiased=True,
                given=False,
                statistics=statistics,
                whitened=a.advantages,
            )
        )
