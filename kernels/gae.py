"""Generalised advantage estimation: a scan over each sequence from its end.

What a token adds to the one before it is one number (``gae_gain``), so that a stretch of tokens is a linear function of
what follows it, rate * later + gain, and stretches join associatively. A masked token is the identity.

A program takes one long sequence or several short ones, in blocks from the end chained by a carry. A padded sequence
past SPLIT tokens goes to a program a block: a first kernel finds each block's function, and the second begins with the
carry that they give. How a sequence is cut depends on its own length alone.

    formula         A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}, over the live tokens
    bytes a token   8 read, 1 more where there is a mask; 8 written
    passes          one; a long sequence that is split among blocks is read twice; whitening follows
    error           at most that of the plain float32 formula, against float64 (tests/ops/test_accuracy.py)
"""

import torch
import triton
import triton.language as tl

from .formulas import FUSED, gae_gain
from .masked_whiten import masked_whiten
from .records import Gae, MaskedWhiten
from .tokens import live_at, load_kept

BLOCK = 1024
SPLIT = 4 * BLOCK
WARPS = 4


@triton.jit
def _join(later_rate, later_gain, rate, gain):
    return later_rate * rate, gain + rate * later_gain


@triton.jit
def _join_with_advantage(later_rate, later_gain, later_slope, later_base, rate, gain, slope, base):
    """Beside the function, slope * later + base: the advantage of the stretch's first token."""
    rate_of_both, gain_of_both = _join(later_rate, later_gain, rate, gain)
    return rate_of_both, gain_of_both, slope * later_rate, base + slope * later_gain


@triton.jit
def _tokens(rewards, values, live, start, size, block, gamma_lam, gamma_rest, BLOCK: tl.constexpr):
    """(index, inside, counted, reward, value, rate, gain) of a block of each row."""
    column = tl.arange(0, BLOCK)[None, :]
    index = start + block * BLOCK + column
    # anything past a block is as good as 2 of them, which 32 bits hold
    inside = tl.broadcast_to(column < tl.minimum(size - block * BLOCK, 2 * BLOCK).to(tl.int32), index.shape)
    counted = live_at(live, index, inside)
    reward = load_kept(rewards, index, inside, counted)
    value = load_kept(values, index, inside, counted)
    rate = tl.where(counted, gamma_lam, 1.0)
    gain = tl.where(counted, gae_gain(reward, value, gamma_lam, gamma_rest), 0.0)
    return index, inside, counted, reward, value, rate, gain


@triton.jit
def _first(x):
    """Of each row."""
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == 0, x, 0.0), 1)


@triton.jit
def _measure(
    rewards, values, live, length, blocks, gamma_lam, gamma_rest, block_rates, block_gains, BLOCK: tl.constexpr
):
    """The function of one block of a sequence of ``length`` tokens."""
    sequence = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    _, _, _, _, _, rate, gain = _tokens(
        rewards, values, live, sequence * length, length, block, gamma_lam, gamma_rest, BLOCK
    )
    rate, gain = tl.associative_scan((rate, gain), 1, _join, reverse=True)
    place = sequence * blocks + block + tl.arange(0, 1)
    tl.store(block_rates + place, _first(rate))
    tl.store(block_gains + place, _first(gain))


@triton.jit
def _without_a_sequence(advantages, returns, start, stop, BLOCK: tl.constexpr):
    """NaN for tokens that wrong bounds leave out."""
    for at in range(start, stop, BLOCK):
        index = at + tl.arange(0, BLOCK)
        nothing = tl.full((BLOCK,), float("nan"), tl.float32)
        tl.store(advantages + index, nothing, mask=index < stop)
        tl.store(returns + index, nothing, mask=index < stop)


@triton.jit
def _sweep(
    rewards,
    values,
    live,
    cu_seqlens,
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
    """Whole sequences or, with the functions of all blocks, one block. BLOCKS is a power of 2, at least ``blocks``."""
    if cu_seqlens is None:
        # rows past the last sequence do the last one's work again, and write the same
        sequence = tl.minimum(tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), sequences - 1)[:, None]
        start = sequence * length
        size = length
    else:
        # wrong bounds must not lead out of the tokens
        bound = cu_seqlens + tl.program_id(0)
        start = tl.minimum(tl.maximum(tl.load(bound), 0), tokens)
        size = tl.minimum(tl.maximum(tl.load(bound + 1), start), tokens) - start
        if tl.program_id(0) == 0:
            _without_a_sequence(advantages, returns, start * 0, start, BLOCK)
        if tl.program_id(0) == sequences - 1:
            _without_a_sequence(advantages, returns, start + size, tokens, BLOCK)
    if block_rates is None:
        first = 0
        last = tl.cdiv(size, BLOCK)
        carry = tl.zeros((ROWS,), tl.float32)
    else:
        first = tl.program_id(1)
        last = first + 1
        other = tl.arange(0, BLOCKS)[None, :]
        after = (other > first) & (other < blocks)
        functions = (
            tl.load(block_rates + sequence * blocks + other, mask=after, other=1.0),
            tl.load(block_gains + sequence * blocks + other, mask=after, other=0.0),
        )
        carry = _first(tl.associative_scan(functions, 1, _join, reverse=True)[1])
    for done in range(first, last):
        index, inside, counted, reward, value, rate, gain = _tokens(
            rewards, values, live, start, size, first + last - 1 - done, gamma_lam, gamma_rest, BLOCK
        )
        slope = tl.full(rate.shape, 1.0, tl.float32)
        rate, gain, slope, base = tl.associative_scan(
            (rate, gain, slope, reward - value), 1, _join_with_advantage, reverse=True
        )
        advantage = tl.where(counted, base + slope * carry[:, None], 0.0)
        tl.store(advantages + index, advantage, mask=inside)
        tl.store(returns + index, advantage + value, mask=inside)
        carry = _first(gain + rate * carry[:, None])


def gae(a: Gae) -> None:
    tokens = a.rewards.numel()
    if tokens == 0:
        return
    if a.sequences == 0:  # packed, and wrongly so
        a.advantages.fill_(float("nan"))
        a.returns.fill_(float("nan"))
        return
    # packed sequences are cut alike, whatever lies beside them
    block = BLOCK if a.cu_seqlens is not None else min(max(triton.next_power_of_2(a.length), 32), BLOCK)
    rows = BLOCK // block
    gamma_lam, gamma_rest = a.gamma * a.lam, a.gamma - a.gamma * a.lam
    blocks = triton.cdiv(a.length, BLOCK) if a.cu_seqlens is None and a.length > SPLIT else 1
    rates = gains = None
    if blocks > 1:
        rates, gains = torch.empty((2, a.sequences, blocks), dtype=torch.float32, device=a.rewards.device)
        _measure[(a.sequences, blocks)](
            a.rewards, a.values, a.live, a.length, blocks, gamma_lam, gamma_rest, rates, gains, BLOCK=BLOCK,
            num_warps=WARPS, **FUSED,
        )  # fmt: skip
    _sweep[(triton.cdiv(a.sequences, rows), blocks)](
        a.rewards, a.values, a.live, a.cu_seqlens, a.sequences, a.length, tokens, gamma_lam, gamma_rest, rates, gains,
        blocks, a.advantages, a.returns, ROWS=rows, BLOCK=block, BLOCKS=triton.next_power_of_2(blocks),
        num_warps=WARPS, **FUSED,
    )  # fmt: skip
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
