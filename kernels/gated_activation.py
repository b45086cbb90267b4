"""activation(gate) * up. The backward recomputes the activation.

formula         activate() of kernels/formulas.py, in float32; one rounding
bytes a number  of b bytes: forward 2 b read, b written; backward 3 b read, 2 b written
passes          one each way
error           a few ulp of float32, before the rounding (tests/ops/test_layers.py)
"""

import triton
import triton.language as tl

from .formulas import activate
from .hidden import BLOCK, WARPS, load_floats, store_rounded
from .launch import kernel, launch
from .records import GatedActivation, GatedActivationBackward


@kernel()
def _multiply(
    gate, gate_stride, up, up_stride, product, product_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value, _ = activate(load_floats(gate + row * gate_stride, column, inside), ACTIVATION)
    value = value * load_floats(up + row * up_stride, column, inside)
    store_rounded(product + row * product_stride, column, value, inside)


@kernel()
def _differentiate(
    gate, gate_stride, up, up_stride, upstream, upstream_stride, grad_gate, grad_gate_stride, grad_up, grad_up_stride,
    width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value, slope = activate(load_floats(gate + row * gate_stride, column, inside), ACTIVATION)
    grad = load_floats(upstream + row * upstream_stride, column, inside)
    grad_of_activation = grad * load_floats(up + row * up_stride, column, inside)
    store_rounded(grad_gate + row * grad_gate_stride, column, grad_of_activation * slope, inside)
    store_rounded(grad_up + row * grad_up_stride, column, grad * value, inside)


def gated_activation(a: GatedActivation) -> None:
    if a.tokens * a.width == 0:
        return
    launch(
        _multiply,
        (a.tokens, triton.cdiv(a.width, BLOCK)),
        gate=a.gate.data,
        gate_stride=a.gate.row_stride,
        up=a.up.data,
        up_stride=a.up.row_stride,
        product=a.product.data,
        product_stride=a.product.row_stride,
        width=a.width,
        ACTIVATION=a.activation,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def gated_activation_backward(a: GatedActivationBackward) -> None:
    if a.tokens * a.width == 0:
        return
    launch(
        _differentiate,
        (a.tokens, triton.cdiv(a.width, BLOCK)),
        gate=a.gate.data,
        gate_stride=a.gate.row_stride,
        up=a.up.data,
        up_stride=a.up.row_stride,
        upstream=a.grad_product.data,
        upstream_stride=a.grad_product.row_stride,
        grad_gate=a.grad_gate.data,
        grad_gate_stride=a.grad_gate.row_stride,
        grad_up=a.grad_up.data,
        grad_up_stride=a.grad_up.row_stride,
        width=a.width,
        ACTIVATION=a.activation,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
