"""Root-mean-square norm. The second read of a row hits the L1 cache.

formula         y = weight * (x * scale), scale = 1 / sqrt(mean(x^2) + eps); sums in float32, one rounding at the end
bytes a number  of b bytes: forward b read, b written; backward 2 b read, b written; and 4 a row. The gradient of a
                weight that is trained: 2 b read once more
passes          one each way
error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_layers.py)
"""

import torch
import triton
import triton.language as tl

from .hidden import BLOCK, WARPS, load_floats, store_rounded
from .launch import kernel, launch
from .records import RmsNorm, RmsNormBackward

# The weight's gradient is a sum over rows. A program adds a part of the rows, at least LEAST_ROWS of them.
LEAST_ROWS = 64
MOST_PARTS = 256
COLUMNS = 256  # of such a program: 8 numbers per thread of its one warp


@triton.jit
def _weighted(x, weight, column, inside):
    if weight is not None:
        x = x * load_floats(weight, column, inside)
    return x


@kernel(general=("scale",))
def _normalise(hidden, hidden_stride, weight, width, eps, normed, normed_stride, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_row = hidden + row * hidden_stride
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = load_floats(x_row, column, column < width)
        squares += x * x
    factor = 1.0 / tl.sqrt(tl.sum(squares) / width + eps)
    tl.store(scale + row, factor)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        x = load_floats(x_row, column, inside) * factor
        store_rounded(normed + row * normed_stride, column, _weighted(x, weight, column, inside), inside)


# With xhat = x * scale and p = grad * weight:
# d loss / d x = scale * (p - xhat * mean(p * xhat)), and the row's part of d loss / d weight = grad * xhat.
@kernel(general=("scale",))
def _differentiate(
    hidden, hidden_stride, weight, width, scale, upstream, upstream_stride, grad, grad_stride, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = hidden + row * hidden_stride
    upstream_row = upstream + row * upstream_stride
    factor = tl.load(scale + row)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        p = _weighted(load_floats(upstream_row, column, inside), weight, column, inside)
        products += p * load_floats(x_row, column, inside)
    pull = factor * (tl.sum(products) * factor / width)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        p = _weighted(load_floats(upstream_row, column, inside), weight, column, inside)
        xhat = load_floats(x_row, column, inside) * factor
        store_rounded(grad + row * grad_stride, column, p * factor - xhat * pull, inside)


@kernel(general=("tokens", "rows", "scale"))
def _sum_rows(
    hidden, hidden_stride, tokens, width, scale, upstream, upstream_stride, rows, parts, COLUMNS: tl.constexpr
):  # fmt: skip
    """A part of the weight's gradient: the sum over ``rows`` rows, of COLUMNS columns."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for row in range(part * rows, tl.minimum((part + 1) * rows, tokens)):
        xhat = load_floats(hidden + row * hidden_stride, column, inside) * tl.load(scale + row)
        total += load_floats(upstream + row * upstream_stride, column, inside) * xhat
    tl.store(parts + part * width + column, total, mask=inside)


@kernel(general=("count",))
def _add_parts(parts, count, width, grad_weight, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for part in range(0, count):
        total += tl.load(parts + part * width + column, mask=inside, other=0.0)
    tl.store(grad_weight + column, total, mask=inside)


def rms_norm(a: RmsNorm) -> None:
    if a.tokens == 0:
        return
    launch(
        _normalise,
        (a.tokens,),
        hidden=a.hidden.data,
        hidden_stride=a.hidden.row_stride,
        weight=a.weight,
        width=a.width,
        eps=a.eps,
        normed=a.normed.data,
        normed_stride=a.normed.row_stride,
        scale=a.scale,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def rms_norm_backward(a: RmsNormBackward) -> None:
    if a.grad_hidden.data is not None and a.tokens > 0:
        launch(
            _differentiate,
            (a.tokens,),
            hidden=a.hidden.data,
            hidden_stride=a.hidden.row_stride,
            weight=a.weight,
            width=a.width,
            scale=a.scale,
            upstream=a.grad_normed.data,
            upstream_stride=a.grad_normed.row_stride,
            grad=a.grad_hidden.data,
            grad_stride=a.grad_hidden.row_stride,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    if a.grad_weight is None or a.width == 0:
        return
    rows = max(LEAST_ROWS, triton.cdiv(a.tokens, MOST_PARTS))
    count, columns = triton.cdiv(a.tokens, rows), triton.cdiv(a.width, COLUMNS)
    parts = torch.empty((count, a.width), dtype=torch.float32, device=a.grad_weight.device)
    if count > 0:
        launch(
            _sum_rows,
            (count, columns),
            hidden=a.hidden.data,
            hidden_stride=a.hidden.row_stride,
            tokens=a.tokens,
            width=a.width,
            scale=a.scale,
            upstream=a.grad_normed.data,
            upstream_stride=a.grad_normed.row_stride,
            rows=rows,
            parts=parts,
            COLUMNS=COLUMNS,
            num_warps=1,
        )
    launch(
        _add_parts,
        (columns,),
        parts=parts,
        count=count,
        width=a.width,
        grad_weight=a.grad_weight,
        COLUMNS=COLUMNS,
        num_warps=2,
    )
