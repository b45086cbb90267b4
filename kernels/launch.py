"""Kernels that are launched, and their launch with arguments by name."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import triton
from torch import Tensor


class Kernel:
    """A Triton kernel in two forms: for arguments that are all multiples of 16, and for any.

    Triton itself compiles a form for every combination of arguments that are multiples of 16, others, and integers that
    are 1. Then one more tensor that is a slice could stop a run in its midst for the seconds that a compilation takes.
    """

    def __init__(self, function: Callable[..., None], general: Collection[str], ours: Collection[str]) -> None:
        self.names = list(inspect.signature(function).parameters)
        variables = [name for name in self.names if function.__annotations__.get(name) is not triton.language.constexpr]
        self.specialised = [name for name in variables if name not in general and name not in ours]
        self.aligned = triton.jit(function, do_not_specialize=general)
        self.any = triton.jit(function, do_not_specialize=[name for name in variables if name not in ours])

    def form(self, arguments: dict[str, Any]) -> Any:
        for name in self.specialised:
            value = arguments[name]
            if isinstance(value, Tensor):
                value = value.data_ptr()
            if isinstance(value, int) and value % 16 != 0:
                return self.any
        return self.aligned


def kernel(*, general: Collection[str] = (), ours: Collection[str] = ()) -> Callable[[Callable[..., None]], Kernel]:
    """Makes a Kernel of a function.

    Args:
        general: arguments of which it does not matter whether they are multiples of 16: another number of rows, say, is
            no reason to compile. Names that the function does not have are ignored.
        ours: tensors that launchers allocate, which begin at a multiple of 16 in both forms.
    """
    return lambda function: Kernel(function, general, ours)


def launch(kernel: Kernel, grid: tuple[int, ...], *, num_warps: int = 4, **arguments: Any) -> None:
    """Launches a kernel with its arguments by name.

    Triton accepts keywords too, but copies them three times, which for 30 arguments takes longer than passing them by
    position, as here. enable_fp_fusion compiles a * b + c to a fused multiply-add; no formula relies on the rounding
    of the product.

    Raises TypeError for a name that the kernel does not have, KeyError for one that is missing.
    """
    form = kernel.form(arguments)
    if len(arguments) > len(kernel.names):
        raise TypeError(f"{form.__name__} has no arguments {sorted(arguments.keys() - set(kernel.names))}")
    form[grid](*[arguments[name] for name in kernel.names], num_warps=num_warps, enable_fp_fusion=True)
