"""How every kernel is launched."""

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, **arguments: Any) -> None:
    """Launches a Triton kernel with its arguments by name.

    Triton takes keywords too, but copies them three times on the way: for 30 of them that costs more than sorting them
    into the kernel's order here. enable_fp_fusion compiles a * b + c to one fused multiply-add with one rounding; no
    formula relies on the rounding of the product.

    Raises TypeError for a name that the kernel does not have, KeyError for one that is missing.
    """
    if len(arguments) > len(kernel.arg_names):
        raise TypeError(f"{kernel.__name__} has no arguments {sorted(arguments.keys() - set(kernel.arg_names))}")
    kernel[grid](*[arguments[name] for name in kernel.arg_names], num_warps=num_warps, enable_fp_fusion=True)
