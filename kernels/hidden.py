"""Loads and stores of the kernels on rows of hidden states. A program takes a row, BLOCK columns at a time."""

import triton
import triton.language as tl

from .numbers import rounded

BLOCK = 1024
WARPS = 4  # 8 numbers per thread: 16 bytes of a 16-bit type


@triton.jit
def load_floats(data, index, inside):
    """data[index] as float32, 0 where not ``inside``."""
    return tl.load(data + index, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rounded(to, index, value, inside):
    tl.store(to + index, rounded(value, to.dtype.element_ty), mask=inside)
