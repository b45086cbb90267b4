"""Matrix products: torch's or the engine's own; those of an lm head, in float32 whatever the factors are, and how many
rows and columns one takes.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import pad

from . import _native
from ._op import fused_op

# On the CPU: the buffer of one chunk's logits. Fewer rows a chunk would read the weight more often than it takes to
# multiply them. And the columns of one product: tiles that stay in the cache are a tenth faster in float32 than the
# whole width at once, and what is added to the logits (bias, adapter) finds them there.
CHUNK_BYTES = 48 << 20
TILE = 2048
# On a GPU: with so many rows the product is bound by arithmetic rather than by reading the weight (an H100 multiplies
# about 250 numbers in the time that it takes to read one of bfloat16), unless their logits would take more than this
# share of the memory. Nothing depends on how much of it is free: the same call is cut up the same way.
GPU_ROWS = 512
GPU_SHARE = 1 / 32
# Columns of a product there to which something is added: a tile that stays in the cache until it is.
GPU_TILE = 8192
# Rows of the buffer begin an odd number of cache lines apart: a power of two between them, of which vocabularies are
# often a multiple, has them fight for the same places in the cache.
LINE = 16
# On the CPU: inner indices that AMX multiplies at once. Of fewer at the end oneDNN reads as many, past the left row,
# and multiplies the surplus by 0; but NaN * 0 is NaN (oneDNN's issue 5717).
BLOCK = 32
# Fewer inner indices than a block that are read alone.
WHOLE = (8, 16, 24)


class Plan(NamedTuple):
    """How the walk over N rows of V logits is cut."""

    rows: int  # of a chunk, whose logits there is memory for
    fold: int  # rows that the fold takes at once, so that it finds in the cache what it reads twice
    columns: int  # of one product
    behind: bool  # where the gradient goes: where the fold before had its logits, or each row over its own


def plan(rows: int, vocab: int, matrices: int, device: torch.device, in_one: bool) -> Plan:
    """For so many matrices of logits side by side. ``in_one`` tells that nothing is added to a product of logits, and
    no part of the weight cast for it.
    """
    row = 4 * vocab
    if device.type == "cuda":
        memory, cache = _gpu(device)
        most, fold = min(GPU_ROWS, int(memory * GPU_SHARE) // row), cache // 2 // (matrices * row)
        columns = vocab if in_one else GPU_TILE
    else:
        most, fold, columns = CHUNK_BYTES // row, rows, TILE
    chunks = max(1, math.ceil(rows / max(1, most)))
    return Plan(max(1, math.ceil(rows / chunks)), max(1, fold), columns, behind=device.type == "cuda")


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Bytes of memory and of L2 cache."""
    properties = torch.cuda.get_device_properties(device)
    return properties.total_memory, properties.L2_cache_size


def empty_logits(cut: Plan, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits of a chunk, uninitialised float32, and over the same memory their gradient in ``dtype``; both (rows, V).

    A GPU folds all columns of a row at once, so that a narrower gradient must not lie over logits of the same fold. It
    begins half a fold before the logits, and so never catches up with what is still to be read.
    """
    width = LINE * (math.ceil(vocab / LINE) | 1)
    ahead = math.ceil(min(cut.fold, cut.rows) / 2) if cut.behind and dtype != torch.float32 else 0
    memory = torch.empty(ahead + cut.rows, width, dtype=torch.float32, device=device)
    logits = memory[ahead:, :vocab]
    if ahead:
        return logits, memory.view(dtype).view(-1, width)[: cut.rows, :vocab]
    return logits, logits.view(dtype)[:, :vocab]


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Of the factors. Without bfloat16 instructions products in float32 are faster, and more exact. In float16 the
    gradient of a logit would vanish: a mean over thousands of tokens takes it below the smallest number.
    """
    halves = hidden.is_cuda or _native.multiplies_bfloat16()
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 and halves else torch.float32


def tiles(vocab: int, columns: int) -> list[slice]:
    """The last one takes a rest of up to half a tile: MKL's thin products depend on the number of threads."""
    starts = range(0, max(vocab - columns // 2, 1), columns)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], vocab], strict=True)]


class _Product(NamedTuple):
    out: Tensor  # (n, m), whose columns lie side by side
    left: Tensor  # (n, k)
    right: Tensor  # (k, m)
    scale: float
    add: bool


def _kernel(given: _Product) -> None:
    _native.float32_product(*given)


_own_product = fused_op("float32_product", _Product, _kernel, lambda given: None, mutates="out")


def _own(left: Tensor) -> bool:
    """Whether the engine multiplies it, rather than torch."""
    return left.dtype == torch.float32 and left.device.type == "cpu" and _native.multiplies_float32()


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left (n, k) right (k, m), both of one dtype, and so the result. It has no gradient."""
    if not _own(left):
        return left @ right
    out = left.new_empty(left.shape[0], right.shape[1])
    _own_product(_Product(out, left, right, 1.0, False))
    return out


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden (n, I) weight (O, I)^T + bias (O,), all of one dtype. It has no gradient."""
    if not _own(hidden):
        return F.linear(hidden, weight, bias)
    out = matmul(hidden, weight.T)
    return out if bias is None else out.add_(bias)


def product(left: Tensor, right: Tensor) -> Tensor:
    """(n, k) x (k, m), both of ``product_dtype`` -> (n, m) in float32. On the CPU a bfloat16 one was rounded.

    There the inner indices past the last whole block go apart, with zeros behind them, and join before the rounding.
    """
    if left.dtype != torch.bfloat16:
        return matmul(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    whole = left.shape[1] // BLOCK * BLOCK
    if whole == left.shape[1]:
        return (left @ right).float()
    rest = -left.shape[1] % BLOCK
    ends = pad(left[:, whole:], (0, rest)) @ pad(right[whole:], (0, 0, 0, rest))
    return torch.addmm(ends, left[:, :whole], right[:whole]).float()


def summed_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """left (N, k)^T right (N, m) -> (k, m) in float32. On the CPU one of halves was rounded to their dtype."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return matmul(left.T, right).float()


def add_product_(sums: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """sums (n, m), whose columns lie side by side, += scale * left (n, k) right (k, m), all of one dtype."""
    if _own(left):
        return _own_product(_Product(sums, left, right, scale, True))
    inner = left.shape[1]
    if left.dtype == torch.bfloat16 and left.device.type == "cpu" and inner % BLOCK and inner not in WHOLE:
        left, right = pad(left, (0, -inner % BLOCK)), pad(right, (0, 0, 0, -inner % BLOCK))
    sums.addmm_(left, right, alpha=scale)


def logits_product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """hidden (n, H) weight^T (H, V) into float32 ``out`` (n, V), which may be a tile of columns."""
    if _own(hidden):
        _own_product(_Product(out, hidden, weight.float().T, 1.0, False))
    elif hidden.dtype == torch.float32:
        torch.mm(hidden, weight.float().T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    else:
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        _native.bfloat16_product(hidden, weight, out)
