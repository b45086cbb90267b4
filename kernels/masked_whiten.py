"""Whitening: mean 0 and variance 1 over the live elements. ``whitened`` may be ``x`` itself.

Only the sums over tiles are float64; float64 arithmetic per element would be slow on a GPU. A mean far from 0 still
loses no precision: the moments of a tile are relative to its own mean, and deviations are computed from a mean that is
the sum of two floats.

    formula         (x - mean) / sqrt(variance + 1e-8)
    bytes a value   forward 8 read, 4 written; backward 16 read, 4 written; half as much for one tile
    passes          two each way; one for a single tile
    error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel, launch
from .records import MaskedMoments, MaskedWhiten, MaskedWhitenBackward
from .tokens import (
    PARTS,
    TILE,
    WARPS,
    live_at,
    load_kept,
    load_part,
    merge_moments,
    tile_moments,
    tile_of_tokens,
)

EPSILON = tl.constexpr(1e-8)  # added to the variance, as in rlhf_fast/ops/masked_whiten.py


@triton.jit
def _load_tile(x, live, count, TILE: tl.constexpr):
    """(index, inside, counted, x) of this program's tile."""
    index = tile_of_tokens(TILE)
    inside = index < count
    counted = live_at(live, index, inside)
    return index, inside, counted, load_kept(x, index, inside, counted)


@triton.jit
def _deviations(x, mean, counted):
    """x - mean in float32. The float64 mean is split into two floats, so it is not rounded."""
    near = mean.to(tl.float32)
    return tl.where(counted, (x - near) - (mean - near).to(tl.float32), 0.0)


@kernel(general=("parts",))
def _measure(x, live, count, parts, TILE: tl.constexpr):
    """parts (4, tiles): count, the two floats of the mean, and the sum of squared deviations of each tile."""
    _, _, counted, x = _load_tile(x, live, count, TILE)
    part_count, near, off, deviation = tile_moments(x, counted)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    tl.store(parts + tile, part_count)
    tl.store(parts + tiles + tile, near)
    tl.store(parts + 2 * tiles + tile, off)
    tl.store(parts + 3 * tiles + tile, deviation)


@triton.jit
def _all_moments(parts, tiles):
    """(count, mean, deviation) over all tiles, in float64. One program adds them, always in the same order."""
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    deviation = tl.zeros((), tl.float64)
    for start in range(0, tiles, PARTS):
        tile = start + tl.arange(0, PARTS)
        means = load_part(parts, 1, tiles, tile) + load_part(parts, 2, tiles, tile)
        count, mean, deviation = merge_moments(
            count, mean, deviation, load_part(parts, 0, tiles, tile), means, load_part(parts, 3, tiles, tile)
        )
    return count, mean, deviation


@kernel(general=("parts", "tiles", "given_mean", "moments"))
def _add_moments(parts, tiles, given_mean, moments):
    """Writes count and, without a given mean, the sum; with one, the sum of squared deviations from it."""
    count, mean, deviation = _all_moments(parts, tiles)
    if given_mean is None:
        second = count * mean
    else:
        step = mean - tl.load(given_mean)
        second = deviation + count * step * step
    tl.store(moments, count)
    tl.store(moments + 1, second)


@triton.jit
def _store_statistics(count, mean, deviation, statistics, UNBIASED: tl.constexpr):
    """Writes count, mean and scale = 1 / sqrt(variance + epsilon). Returns the scale."""
    scale = 1.0 / tl.sqrt(deviation / tl.maximum(count - UNBIASED, 1.0) + EPSILON)
    tl.store(statistics, count)
    tl.store(statistics + 1, mean)
    tl.store(statistics + 2, scale)
    return scale


@kernel(general=("parts", "tiles", "statistics"))
def _add_statistics(parts, tiles, statistics, UNBIASED: tl.constexpr):
    count, mean, deviation = _all_moments(parts, tiles)
    _store_statistics(count, mean, deviation, statistics, UNBIASED)


@kernel(general=("statistics",))
def _whiten(
    x,
    live,
    count,
    statistics,
    whitened,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    MEASURE: tl.constexpr,
    TILE: tl.constexpr,
):
    """With MEASURE there is one tile, whose statistics are computed and written here, which saves two launches."""
    index, inside, counted, x = _load_tile(x, live, count, TILE)
    if MEASURE:
        tile_count, near, off, deviation = tile_moments(x, counted)
        mean = near.to(tl.float64) + off.to(tl.float64)
        scale = _store_statistics(tile_count.to(tl.float64), mean, deviation.to(tl.float64), statistics, UNBIASED)
    else:
        mean = tl.load(statistics + 1)
        scale = tl.load(statistics + 2)
    result = _deviations(x, mean, counted) * scale.to(tl.float32)
    if not SHIFT_MEAN:
        result = tl.where(counted, result + mean.to(tl.float32), 0.0)
    tl.store(whitened + index, result, mask=inside)


@kernel(general=("statistics", "parts"))
def _measure_backward(x, live, count, statistics, grad_whitened, parts, TILE: tl.constexpr):
    """parts (2, tiles): sum(grad) and sum(grad * d) of each tile."""
    index, inside, counted, x = _load_tile(x, live, count, TILE)
    upstream = load_kept(grad_whitened, index, inside, counted)
    deviations = _deviations(x, tl.load(statistics + 1), counted)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    tl.store(parts + tile, tl.sum(upstream))
    tl.store(parts + tiles + tile, tl.sum(upstream * deviations))


# With d = x - mean and variance = sum(d^2) / k:
# d loss / d x = scale * (grad - mean(grad)) - d * scale^3 * sum(grad * d) / k, and + mean(grad) without shift_mean.
@kernel(general=("statistics", "parts", "tiles"))
def _whiten_backward(
    x,
    live,
    count,
    statistics,
    grad_whitened,
    parts,
    tiles,
    grad,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    TILE: tl.constexpr,
):
    """If ``parts`` is None there is one tile, whose sums are computed here."""
    index, inside, counted, x = _load_tile(x, live, count, TILE)
    upstream = load_kept(grad_whitened, index, inside, counted)
    deviations = _deviations(x, tl.load(statistics + 1), counted)
    if parts is None:
        total = tl.sum(upstream).to(tl.float64)
        product = tl.sum(upstream * deviations).to(tl.float64)
    else:
        # Every program adds the few parts, which is cheaper than another launch.
        total = tl.zeros((), tl.float64)
        product = tl.zeros((), tl.float64)
        for start in range(0, tiles, PARTS):
            tile = start + tl.arange(0, PARTS)
            total += tl.sum(load_part(parts, 0, tiles, tile))
            product += tl.sum(load_part(parts, 1, tiles, tile))
    elements = tl.load(statistics)
    scale = tl.load(statistics + 2)
    mean_grad = total / tl.maximum(elements, 1.0)
    slope = -scale * scale * scale * product / tl.maximum(elements - UNBIASED, 1.0)
    result = _deviations(upstream, mean_grad, counted) * scale.to(tl.float32) + deviations * slope.to(tl.float32)
    if not SHIFT_MEAN:
        result = result + mean_grad.to(tl.float32)
    tl.store(grad + index, tl.where(counted, result, 0.0), mask=inside)


def masked_moments(a: MaskedMoments) -> None:
    tiles = _tiles(a.elements)
    parts = _measured(a, tiles)
    launch(_add_moments, (1,), parts=parts, tiles=tiles, given_mean=a.mean, moments=a.moments)


def masked_whiten(a: MaskedWhiten) -> None:
    tiles = _tiles(a.elements)
    if tiles > 1 and not a.given:
        parts = _measured(a, tiles)
        launch(_add_statistics, (1,), parts=parts, tiles=tiles, statistics=a.statistics, UNBIASED=a.unbiased)
    launch(
        _whiten,
        (tiles,),
        x=a.x,
        live=a.live,
        count=a.elements,
        statistics=a.statistics,
        whitened=a.whitened,
        SHIFT_MEAN=a.shift_mean,
        UNBIASED=a.unbiased,
        MEASURE=tiles == 1 and not a.given,
        TILE=TILE,
        num_warps=WARPS,
    )


def masked_whiten_backward(a: MaskedWhitenBackward) -> None:
    tiles = _tiles(a.elements)
    parts = None
    if tiles > 1:
        parts = torch.empty((2, tiles), dtype=torch.float32, device=a.x.device)
        launch(
            _measure_backward,
            (tiles,),
            x=a.x,
            live=a.live,
            count=a.elements,
            statistics=a.statistics,
            grad_whitened=a.grad_whitened,
            parts=parts,
            TILE=TILE,
            num_warps=WARPS,
        )
    launch(
        _whiten_backward,
        (tiles,),
        x=a.x,
        live=a.live,
        count=a.elements,
        statistics=a.statistics,
        grad_whitened=a.grad_whitened,
        parts=parts,
        tiles=tiles,
        grad=a.grad,
        SHIFT_MEAN=a.shift_mean,
        UNBIASED=a.unbiased,
        TILE=TILE,
        num_warps=WARPS,
    )


def _tiles(elements: int) -> int:
    return max(triton.cdiv(elements, TILE), 1)


def _measured(a: MaskedMoments | MaskedWhiten, tiles: int) -> Tensor:
    parts = torch.empty((4, tiles), dtype=torch.float32, device=a.x.device)
    launch(_measure, (tiles,), x=a.x, live=a.live, count=a.elements, parts=parts, TILE=TILE, num_warps=WARPS)
    return parts
