"""Functions of the row formulas that Triton lacks or computes too inaccurately (its log near 1)."""

import triton
import triton.language as tl

from .formulas import expm1

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Bound of a log-ratio that is multiplied by a probability. Where the probability is 0, the product is 0, not 0 * inf.
FAR: tl.constexpr = tl.constexpr(1e4)


@triton.jit
def at_most(x, bound):
    """min(x, bound), but NaN where x is NaN."""
    return tl.where(x > bound, bound, x)


@triton.jit
def tanh(x):
    # (e^2x - 1) / (e^2x + 1), with expm1 for accuracy at small x. For |x| > 10 it rounds to +-1.
    bounded = tl.where(x > 10.0, 10.0, tl.where(x < -10.0, -10.0, x))
    e = expm1(bounded + bounded)
    return e / (e + 2.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to a few ulp."""
    # 1. 1 + x = 2^n (1 + m) with m in [-1/4, 1/2]: n from the exponent bits of the rounded 1 + x.
    n = ((1.0 + x).to(tl.int32, bitcast=True) - 0x3F400000) >> 23
    inverse_power = ((127 - n) << 23).to(tl.float32, bitcast=True)
    # 2. m from x, not from the rounded 1 + x, so that a small x keeps all its digits.
    m = x * inverse_power + (inverse_power - 1.0)
    # 3. log(1 + m) = 2 artanh(m / (2 + m)), by a series in z^2 <= 1/25.
    z = m / (m + 2.0)
    square = z * z
    series = square * (1.0 / 9.0) + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    return n.to(tl.float32) * 0.6931472 + (z + z) * (series * square + 1.0)


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """``x`` in the type KIND, rounded to nearest, ties to even.

    Triton's interpreter truncates instead; the tests replace this function there.
    """
    return x.to(KIND)
