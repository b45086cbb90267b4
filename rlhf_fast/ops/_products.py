"""Matrix products, computed by torch or by the compiled engine, and the chunk and tile sizes of an lm head's products.

Logits are float32 for every dtype of the factors. n, k, m are the sizes of a product (n, k) x (k, m); k is its K
dimension. The columns of a row-major matrix are contiguous where a docstring says so; rows may have any stride.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import pad

from . import _native
from ._native import Term
from ._op import fused_op

# CPU: bytes of one chunk's logits. With smaller chunks, reading the weight once per chunk would take longer than the
# multiplications.
CHUNK_BYTES = 48 << 20
# CPU: columns of one product of torch's. In float32, tiles that stay in the cache are a tenth faster than the whole
# width at once. Bias and adapter are then added to a tile that is still in the cache. The engine's products cut the
# whole width into tasks by themselves; a product a tile would only have threads that share their cores with another
# process wait for each other after each tile.
TILE = 2048
# GPU: bytes of a chunk's logits, 1024 rows of 131072. With fewer rows the products, which read the weight once a chunk,
# would be bound by memory.
GPU_BYTES = 512 << 20
# GPU: but at most this share of the total memory. The free memory plays no part, so the same call always has the same
# chunks.
GPU_SHARE = 1 / 32
# GPU: rows of a product with which the gradient of a trained weight is summed. Each such product reads and writes the
# whole gradient, 8 bytes an entry: with 2048 rows it takes twice as long to multiply (see "Notes for GPUs" in
# docs/operations.md).
GPU_GROUP = 2048
# GPU: launches of the kernel for a chunk. Fewer take more memory (see empty_logits), more take more time on the host.
GPU_LAUNCHES = 8
# GPU: columns of one product whose weight is cast, or to which a bias or an adapter is added while the tile is in L2.
GPU_TILE = 8192
# Floats of a 64-byte cache line. The buffer's leading dimension is an odd number of lines: with a power of two between
# rows (vocabulary sizes are often multiples of one), equal columns of all rows would map to the same cache sets.
LINE = 16
# GPU: the leading dimension is a multiple of this, so that a row of a 16-bit gradient starts on 128 bytes.
GPU_LINE = 64
# CPU: the K block of AMX. Where K is no multiple of it, oneDNN reads a whole block, past the end of the left row, and
# multiplies the surplus by 0; but NaN * 0 is NaN (oneDNN's issue 5717).
BLOCK = 32
# K below one block for which oneDNN does not read past the row.
WHOLE = (8, 16, 24)


class Plan(NamedTuple):
    """Chunk and tile sizes for N rows of V logits."""

    rows: int  # of a chunk at most: its logits fill the buffer
    fold: int  # rows of one kernel launch (a "fold", see _sweep.py)
    columns: int  # of one product
    behind: bool  # the kernel writes all columns of several rows at once: see empty_logits
    group: int  # rows whose gradients are multiplied together: those of a chunk, or of several (see chunks)


def plan(rows: int, vocab: int, matrices: int, device: torch.device, in_one: bool, keeps: bool) -> Plan:
    """Sizes for ``matrices`` logits matrices (rows, vocab) that one kernel reads together.

    Args:
        in_one: the logits are one product, without a bias, an adapter or a cast of the weight.
        keeps: the weight is trained and the gradient of the logits has 16 bits, so that a GPU may keep several chunks'.
    """
    gpu = device.type == "cuda"
    size, columns = CHUNK_BYTES, TILE
    if gpu:
        size, columns = min(GPU_BYTES, int(_memory(device) * GPU_SHARE)) // matrices, GPU_TILE
    if in_one and (gpu or _native.multiplies_float32()):
        columns = vocab
    chunk = group = max(1, size // (4 * vocab))
    if gpu and keeps and chunk < GPU_GROUP:
        group = min(2 * chunk, GPU_GROUP)
    group = max(1, math.ceil(rows / max(1, math.ceil(rows / group))))
    chunk = min(chunk, group)
    return Plan(chunk, math.ceil(chunk / GPU_LAUNCHES) if gpu else chunk, columns, gpu, group)


@functools.cache
def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


class Chunk(NamedTuple):
    rows: slice  # of its group
    place: int  # the row of the buffer where its logits begin


def chunks(cut: Plan, rows: int, dtype: torch.dtype) -> list[Chunk]:
    """The chunks of a group of ``rows`` rows, whose gradient has ``dtype``.

    A group of several chunks keeps their gradients at the beginning of the buffer, in 16 bits. Each chunk takes what is
    left, so that one has about half the rows of the one before.
    """
    found: list[Chunk] = []
    start, buffer = 0, cut.rows + _ahead(cut, dtype)
    while start < rows:
        place = math.ceil((start + min(cut.fold, rows - start)) / 2) if _overlaid(cut, dtype) else 0
        stop = min(start + min(cut.rows, buffer - place), rows)
        found.append(Chunk(slice(start, stop), place))
        start = stop
    return found


def _overlaid(cut: Plan, dtype: torch.dtype) -> bool:
    """Whether the gradient rows lie closer together than those of the logits."""
    return cut.behind and dtype != torch.float32


def _ahead(cut: Plan, dtype: torch.dtype) -> int:
    """Rows of the buffer beside those of a chunk. Half of them again shorten the tail of small chunks of a group."""
    fold = min(cut.fold, cut.rows)
    return math.ceil(fold / 2 if cut.group <= cut.rows else fold * 3 / 4) if _overlaid(cut, dtype) else 0


def empty_logits(cut: Plan, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """One buffer, uninitialised: room for a chunk's logits in float32 (rows, V), and for the gradients of its group in
    ``dtype`` (group, V).

    The gradient overwrites the logits in place. A 16-bit gradient row takes half the bytes of its logits row. On a CPU
    it lies over the first half of it. A GPU kernel works on all columns of ``cut.fold`` rows in parallel, so there it
    must not write to logits of the same launch. A chunk's logits therefore begin (``Chunk.place``) where the gradients
    of its first launch end, or later: those of the launch after it end no later than its logits begin, and so on.
    """
    width = GPU_LINE * math.ceil(vocab / GPU_LINE) if cut.behind else LINE * (math.ceil(vocab / LINE) | 1)
    rows = cut.rows + _ahead(cut, dtype)
    memory = torch.empty(rows, width, dtype=torch.float32, device=device)
    if _overlaid(cut, dtype):
        return memory[:, :vocab], memory.view(dtype).view(-1, width)[: cut.group, :vocab]
    return memory[:, :vocab], memory.view(dtype)[:, :vocab]


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of a product's factors: bfloat16 where hidden has it and the processor multiplies it, else float32.

    Without bfloat16 instructions, float32 products are faster and more exact. float16 is never used: the gradient of a
    logit, divided by thousands of tokens, would underflow.
    """
    halves = hidden.is_cuda or _native.multiplies_bfloat16()
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 and halves else torch.float32


def tiles(vocab: int, columns: int) -> list[slice]:
    """Slices of ``columns`` columns. A remainder of at most half a tile joins the last one.

    MKL's results for narrow products depend on the number of threads.
    """
    starts = range(0, max(vocab - columns // 2, 1), columns)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], vocab], strict=True)]


class _Float32Product(NamedTuple):
    out: Tensor  # (n, m), columns contiguous
    left: Tensor  # (n, k)
    right: Tensor  # (k, m)
    scale: float
    add: bool


def _float32_kernel(given: _Float32Product) -> None:
    _native.float32_product(*given)


_float32_product = fused_op("float32_product", _Float32Product, _float32_kernel, lambda given: None, mutates="out")


class _BFloat16Product(NamedTuple):
    out: Tensor  # (n, m), columns contiguous
    bias: Tensor | None  # (m,)
    lefts: list[Tensor]  # of each term
    rights: list[Tensor]
    starts: list[int]
    scales: list[float]


def _bfloat16_kernel(given: _BFloat16Product) -> None:
    terms = map(Term, given.lefts, given.rights, given.starts, given.scales)
    _native.bfloat16_product(given.out, list(terms), given.bias)


_bfloat16_product = fused_op("bfloat16_product", _BFloat16Product, _bfloat16_kernel, lambda given: None, mutates="out")


def _own_float32(left: Tensor) -> bool:
    """Whether the compiled engine computes the product, not torch."""
    return left.dtype == torch.float32 and left.device.type == "cpu" and _native.multiplies_float32()


def _own_bfloat16(left: Tensor) -> bool:
    return left.dtype == torch.bfloat16 and left.device.type == "cpu" and _native.prefers_bfloat16()


def sum_of_products(terms: Sequence[Term], bias: Tensor | None = None) -> Tensor:
    """bias (m,) + the sum of ``terms``, all of one dtype. Not differentiable.

    The last term has all rows and scale 1. Where the engine computes it, a 16-bit result is rounded once; torch rounds
    after each term.
    """
    *others, last = terms
    left, right = last.left, last.right
    if _own_bfloat16(left):
        out = left.new_empty(left.shape[0], right.shape[1])
        _sum_bfloat16(out, terms, bias)
        return out
    out = linear(left, right.T, bias) if bias is not None else matmul(left, right)
    for term in others:
        stop = term.start + term.left.shape[0]
        add_product_(out[term.start : stop] if stop - term.start < len(out) else out, term.left, term.right, term.scale)
    return out


def _sum_bfloat16(out: Tensor, terms: Sequence[Term], bias: Tensor | None = None) -> None:
    lefts = [left if left.stride(1) == 1 else left.contiguous() for left, *_ in terms]
    rights = [term.right for term in terms]
    starts, scales = [term.start for term in terms], [float(term.scale) for term in terms]
    _bfloat16_product(_BFloat16Product(out, bias, lefts, rights, starts, scales))


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left (n, k) x right (k, m), all of one dtype. Not differentiable."""
    if _own_float32(left):
        out = left.new_empty(left.shape[0], right.shape[1])
        _float32_product(_Float32Product(out, left, right, 1.0, False))
        return out
    # torch reads a left factor whose columns are not contiguous without copying it
    return sum_of_products([Term(left, right)]) if _own_bfloat16(left) and left.stride(1) == 1 else left @ right


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden (n, I) x weight (O, I)^T + bias (O,), all of one dtype. Not differentiable."""
    if _own_bfloat16(hidden):
        return sum_of_products([Term(hidden, weight.T)], bias)
    if not _own_float32(hidden):
        return F.linear(hidden, weight, bias)
    out = matmul(hidden, weight.T)
    return out if bias is None else out.add_(bias)


def product(left: Tensor, right: Tensor) -> Tensor:
    """(n, k) x (k, m), both of ``product_dtype`` -> (n, m) in float32.

    torch rounds a bfloat16 product first on a CPU. If K is no multiple of BLOCK there, the remainder of K is multiplied
    separately, padded with zeros, and added by the main product.
    """
    if left.dtype != torch.bfloat16:
        return matmul(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    if _own_bfloat16(left) and left.stride(1) == 1:
        out = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
        _sum_bfloat16(out, [Term(left, right)])
        return out
    whole = left.shape[1] // BLOCK * BLOCK
    if whole == left.shape[1]:
        return (left @ right).float()
    rest = -left.shape[1] % BLOCK
    ends = pad(left[:, whole:], (0, rest)) @ pad(right[whole:], (0, 0, 0, rest))
    return torch.addmm(ends, left[:, :whole], right[:whole]).float()


def add_over_rows_(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """float32 sums (k, m) += left (N, k)^T x right (N, m), both of ``product_dtype``."""
    if left.is_cuda and left.dtype != torch.float32:
        batch = sums[None]  # of the products with 16-bit factors and a float32 result, only batched ones add in float32
        torch.baddbmm(batch, left.T[None], right[None], out_dtype=torch.float32, out=batch)
        return
    if left.device.type == "cpu" and _native.multiplies_float32():
        # A sum over few rows: the bfloat16 product, which packs its right factor, takes up to ten times as long.
        right = right.float()
        for tile in tiles(left.shape[1], left.shape[1] if left.dtype == torch.float32 else 4 * TILE):
            add_product_(sums[tile], left[:, tile].float().T, right, 1.0)
        return
    for tile in tiles(left.shape[1], TILE):
        if left.dtype == torch.float32:
            add_product_(sums[tile], left[:, tile].T, right, 1.0)
        else:
            sums[tile] += product(left[:, tile].T, right)


def summed_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """left (N, k)^T x right (N, m) -> (k, m) in float32. On a CPU a 16-bit product is rounded to 16 bits first."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return matmul(left.T, right).float()


def add_product_(sums: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """sums (n, m) += scale * left (n, k) x right (k, m), all of one dtype; the columns of sums are contiguous."""
    if _own_float32(left):
        return _float32_product(_Float32Product(sums, left, right, scale, True))
    inner = left.shape[1]
    if left.dtype == torch.bfloat16 and left.device.type == "cpu" and inner % BLOCK and inner not in WHOLE:
        left, right = pad(left, (0, -inner % BLOCK)), pad(right, (0, 0, 0, -inner % BLOCK))
    sums.addmm_(left, right, alpha=scale)


def logits_product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """hidden (n, H) x weight^T (H, V) into float32 ``out`` (n, V), which may be a tile of a wider matrix."""
    if _own_float32(hidden):
        _float32_product(_Float32Product(out, hidden, weight.float().T, 1.0, False))
    elif hidden.dtype == torch.float32:
        torch.mm(hidden, weight.float().T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    else:
        _native.bfloat16_product(out, [Term(hidden if hidden.stride(1) == 1 else hidden.contiguous(), weight.T)])
