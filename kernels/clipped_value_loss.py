"""PPO's clipped value loss and its gradient in one sweep over the tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import FUSED, value_token
from .tokens import PARTS, TILE, WARPS, Shares, live_at, load_kept, load_part, tile_of_tokens, token_share


@triton.jit(do_not_specialize=["length"])
def _evaluate(
    values,
    old_values,
    returns,
    live,
    tokens,
    clip,
    share,
    counts,
    entries,
    length,
    grad,
    parts,
    loss,
    clip_fraction,
    ITEMS: tl.constexpr,
    DIFFER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the gradient of a tile, and its sums to ``parts`` or, without them, the results."""
    index = tile_of_tokens(TILE)
    inside = index < tokens
    counted = live_at(live, index, inside)
    token_loss, slope, clipped = value_token(
        load_kept(values, index, inside, counted),
        load_kept(old_values, index, inside, counted),
        load_kept(returns, index, inside, counted),
        clip,
    )
    share = token_share(share, counts, entries, tokens, length, index, inside, counted, ITEMS, DIFFER)
    if grad is not None:
        tl.store(grad + index, tl.where(counted, slope * share, 0.0), mask=inside)
    total = tl.sum(token_loss * share)
    count = tl.sum(counted.to(tl.float32))
    outside = tl.sum(clipped.to(tl.float32))
    if parts is None:
        _finish(total, count, outside, loss, clip_fraction)
    else:
        tile, tiles = tl.program_id(0), tl.num_programs(0)
        tl.store(parts + tile, total)
        tl.store(parts + tiles + tile, count)
        tl.store(parts + 2 * tiles + tile, outside)


@triton.jit
def _finish(total, count, outside, loss, clip_fraction):
    tl.store(loss, total.to(tl.float32))
    tl.store(clip_fraction, (outside / tl.maximum(count, 1.0)).to(tl.float32))


@triton.jit
def _add(parts, tiles, loss, clip_fraction):
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.float64)
    outside = tl.zeros((), tl.float64)
    for start in range(0, tiles, PARTS):
        tile = start + tl.arange(0, PARTS)
        total += tl.sum(load_part(parts, 0, tiles, tile))
        count += tl.sum(load_part(parts, 1, tiles, tile))
        outside += tl.sum(load_part(parts, 2, tiles, tile))
    _finish(total, count, outside, loss, clip_fraction)


def clipped_value_loss(
    sequences: int,
    length: int,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    live: Tensor | None,
    clip: float,
    aggregation: int,
    num_items: float,
    loss: Tensor,
    clip_fraction: Tensor,
    grad: Tensor | None,
    threads: int,
) -> None:
    shares = Shares(sequences, length, live, aggregation, num_items, values.device)
    tiles = shares.tiles
    parts = torch.empty((3, tiles), dtype=torch.float32, device=values.device) if tiles > 1 else None
    _evaluate[(tiles,)](
        values,
        old_values,
        returns,
        live,
        sequences * length,
        clip,
        shares.share,
        shares.counts,
        shares.entries,
        max(length, 1),
        grad,
        parts,
        loss,
        clip_fraction,
        ITEMS=shares.items,
        DIFFER=shares.differ,
        TILE=TILE,
        num_warps=WARPS,
        **FUSED,
    )
    if parts is not None:
        _add[(1,)](parts, tiles, loss, clip_fraction, num_warps=4, **FUSED)
