"""Estimates of the KL from two log-probs per token: one pass forward, one backward.

formula         value and slope of the table in rlhf_fast/ops/token_kl.py, d = logprob - ref_logprob
bytes a token   forward 8 read, 4 written; backward 12 read, 4 written; 1 more read with a mask
passes          one each way
error           1 ulp of the difference; k3 to a few ulps, although exp(x) - 1 - x cancels
"""

import triton
import triton.language as tl
from torch import Tensor

from .formulas import kl_slope, kl_value
from .launch import kernel, launch
from .records import TokenKl, TokenKlBackward
from .tokens import TILE, WARPS, live_at, tile_of_tokens


@kernel()
def _sweep(logprobs, ref_logprobs, live, grad_kl, out, tokens, ESTIMATOR: tl.constexpr, TILE: tl.constexpr):
    """The estimates or, with grad_kl, the gradient; both are 0 for a token that does not count."""
    index = tile_of_tokens(TILE)
    inside = index < tokens
    counted = live_at(live, index, inside)
    logprob = tl.load(logprobs + index, mask=inside, other=0.0)
    # The mask is applied after the loads, so that they stay vector loads. Masked tokens may be NaN.
    difference = tl.where(counted, logprob - tl.load(ref_logprobs + index, mask=inside, other=0.0), 0.0)
    if grad_kl is None:
        result = kl_value(difference, ESTIMATOR)
    else:
        grad = tl.load(grad_kl + index, mask=inside, other=0.0)
        result = tl.where(counted, grad * kl_slope(difference, ESTIMATOR), 0.0)
    tl.store(out + index, result, mask=inside)


def token_kl(a: TokenKl) -> None:
    _launch(a, None, a.kl, a.estimator)


def token_kl_backward(a: TokenKlBackward) -> None:
    _launch(a, a.grad_kl, a.grad, a.slope)


def _launch(a: TokenKl | TokenKlBackward, grad_kl: Tensor | None, out: Tensor, estimator: int) -> None:
    if a.tokens == 0:
        return
    launch(
        _sweep,
        (triton.cdiv(a.tokens, TILE),),
        logprobs=a.logprobs,
        ref_logprobs=a.ref_logprobs,
        live=a.live,
        grad_kl=grad_kl,
        out=out,
        tokens=a.tokens,
        ESTIMATOR=estimator,
        TILE=TILE,
        num_warps=WARPS,
    )
