"""Launches a kernel with its arguments by name."""

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, **arguments: Any) -> None:
    """Launches a Triton kernel with its arguments by name.

    Triton accepts keywords too, but copies them three times, which for 30 arguments takes longer than passing them by
    position, as here. enable_fp_fusion compiles a * b + c to a fused multiply-add; no formula relies on the rounding
    of the product.

    Raises TypeError for a name that the kernel does not have, KeyError for one that is missing.
    """
    if len(arguments) > len(kernel.arg_names):
        raise TypeError(f"{kernel.__name__} has no arguments {sorted(arguments.keys() - set(kernel.arg_names))}")
    kernel[grid](*[arguments[name] for name in kernel.arg_names], num_warps=num_warps, enable_fp_fusion=True)
