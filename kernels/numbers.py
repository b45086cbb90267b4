"""Functions of the rows' formulas that Triton lacks or, like its log next to 1, has with too few digits."""

import triton
import triton.language as tl

from .formulas import expm1

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Stands for an infinite log-ratio where it meets a probability that has underflowed to 0, so that 0 * inf is 0.
FAR: tl.constexpr = tl.constexpr(1e4)


@triton.jit
def at_most(x, bound):
    """NaN stays."""
    return tl.where(x > bound, bound, x)


@triton.jit
def tanh(x):
    bounded = tl.where(x > 10.0, 10.0, tl.where(x < -10.0, -10.0, x))
    e = expm1(bounded + bounded)
    return e / (e + 2.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: 1 + x = 2^n (1 + m) with m in [-1/4, 1/2], and log(1 + m) = 2 artanh(m / (2 + m))."""
    n = ((1.0 + x).to(tl.int32, bitcast=True) - 0x3F400000) >> 23
    inverse_power = ((127 - n) << 23).to(tl.float32, bitcast=True)
    m = x * inverse_power + (inverse_power - 1.0)
    z = m / (m + 2.0)
    square = z * z
    series = square * (1.0 / 9.0) + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    return n.to(tl.float32) * 0.6931472 + (z + z) * (series * square + 1.0)


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """In the type KIND, to nearest, ties to even. (Triton's interpreter cuts instead: the tests put in a function of
    their own.)
    """
    return x.to(KIND)
