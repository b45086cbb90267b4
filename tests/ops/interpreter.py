"""Triton's interpreter on CPU tensors, without most of what it does again and again."""

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from rlhf_fast.kernels import gradients, hidden
from rlhf_fast.ops._triton import Triton


class Interpreted(Triton):
    """The launchers of kernels/ on CPU memory."""

    def why_not(self, device: torch.device) -> str | None:
        return None


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """kernels/numbers.py's, which a GPU rounds to nearest, ties to even; the interpreter cuts the low bits off."""
    if KIND == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(KIND)


def quicken() -> None:
    """Within a kernel it patches Triton's language anew at every call of a function, which takes most of its time. Once
    a module will do.
    """
    patched = set()

    def call(self: interpreter.InterpretedFunction, *arguments: object, **named: object) -> object:
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call
    gradients.rounded = rounded
    hidden.rounded = rounded
