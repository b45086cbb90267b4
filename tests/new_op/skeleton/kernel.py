"""One sentence: what it computes of each token: one sweep forward, one backward.

formula         sample_op_value and sample_op_slope, as in csrc/formulas.h
bytes a token   forward 4 read, 4 written; backward 8 read, 4 written; 1 more read where there is a mask
passes          one each way
error           1 ulp
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel, launch
from .records import SampleOp, SampleOpBackward
from .tokens import TILE, WARPS, live_at, load_kept, tile_of_tokens


@triton.jit
def sample_op_value(x, scale):
    return x * scale


@triton.jit
def sample_op_slope(x, scale):
    return scale


@kernel()
def _sweep(x, live, scale, grad_y, out, tokens, TILE: tl.constexpr):
    """The values or, with grad_y, the gradient."""
    index = tile_of_tokens(TILE)
    inside = index < tokens
    counted = live_at(live, index, inside)
    value = load_kept(x, index, inside, counted)
    if grad_y is None:
        result = sample_op_value(value, scale)
    else:
        result = load_kept(grad_y, index, inside, counted) * sample_op_slope(value, scale)
    tl.store(out + index, tl.where(counted, result, 0.0), mask=inside)


def sample_op(a: SampleOp) -> None:
    _launch(a, None, a.y)


def sample_op_backward(a: SampleOpBackward) -> None:
    _launch(a, a.grad_y, a.grad)


def _launch(a: SampleOp | SampleOpBackward, grad_y: Tensor | None, out: Tensor) -> None:
    if a.tokens > 0:
        grid = (triton.cdiv(a.tokens, TILE),)
        launch(
            _sweep,
            grid,
            x=a.x,
            live=a.live,
            scale=a.scale,
            grad_y=grad_y,
            out=out,
            tokens=a.tokens,
            TILE=TILE,
            num_warps=WARPS,
        )
