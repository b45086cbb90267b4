"""activation(gate) * up of a gated feed-forward layer: SwiGLU, GEGLU, ReGLU (Shazeer, "GLU Variants Improve
Transformer", 2020).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._dispatch import implementation, implements, launch
from ._op import fused_op
from ._rows import accumulation_dtype, dtype_code, flat_rows, hidden_of
from ._vocab import sigmoid

# Not torch.nn.functional's silu and gelu: their vector and scalar loops round differently, so their results depend on
# the number of threads.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu_tanh": lambda x: x * _sigmoid(_gelu_exponent(x.clamp(-30.0, 30.0))),
    "gelu": lambda x: 0.5 * x * torch.erfc(-x * 0.5**0.5),
    "relu": torch.relu,
}


def _gelu_exponent(x: Tensor) -> Tensor:
    """2 z of (1 + tanh(z)) / 2 = sigmoid(2 z). The caller clamps x to +-30, where the sigmoid is 0 or 1 in float64."""
    return (8 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)


def _sigmoid(x: Tensor) -> Tensor:
    """sigmoid(x) with x bounded, because the gradient of an exponential that overflows would be 0 * inf."""
    return sigmoid(x.clamp(min=-87.0))


def gated_activation(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate) * up, computed in float32 and rounded once.

    | activation | a(x)                                                     | models                  |
    |------------|----------------------------------------------------------|-------------------------|
    | silu       | x / (1 + exp(-x))                                        | Llama, Qwen, Mistral    |
    | gelu_tanh  | x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2        | Gemma                   |
    | gelu       | x Phi(x), Phi the normal distribution function           |                         |
    | relu       | max(x, 0)                                                |                         |

    Args:
        gate: (..., I), float. Differentiable, as is ``up``. Only these two are saved; the backward recomputes the
            activation.
        up: same shape and dtype. The strides may differ: both may be halves of one (..., 2 I) product.
        activation: a name of the table.

    Returns:
        Shape and dtype of ``gate``, contiguous, inside autocast too.

    Raises:
        TypeError: an input is not a floating-point tensor, or the dtypes differ.
        ValueError: shapes or devices differ; unknown activation.
    """
    _checks.floating("gated_activation", gate=gate, up=up)
    _checks.shaped("gated_activation", gate.shape, "that of gate", up=up)
    _checks.same_device("gated_activation", gate=gate, up=up)
    _checks.one_of("gated_activation", "activation", activation, records.ACTIVATIONS)
    if gate.dtype != up.dtype:
        raise TypeError(f"gated_activation: up must be {gate.dtype} like gate; got {up.dtype}")
    code = records.ACTIVATIONS.index(activation)
    return implementation("gated_activation", gate)(Inputs(gate, up, code))


class Inputs(NamedTuple):
    gate: Tensor  # (..., I), like up
    up: Tensor
    activation: int  # index in records.ACTIVATIONS


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("gated_activation", "torch")
def _torch(inputs: Inputs) -> Tensor:
    dtype = accumulation_dtype(inputs.gate.dtype)
    activated = _FUNCTIONS[records.ACTIVATIONS[inputs.activation]](inputs.gate.to(dtype))
    return (activated * inputs.up.to(dtype)).to(inputs.gate.dtype).contiguous()


# ---- on the engines: one pass forward, one backward -----------------------------------------------------------------


def _kernel(inputs: Inputs) -> Tensor:
    gate, product = flat_rows(inputs.gate), _fake(inputs)
    launch(
        records.GatedActivation(
            tokens=gate.shape[0],
            width=gate.shape[1],
            dtype=dtype_code(gate),
            activation=inputs.activation,
            gate=hidden_of(gate),
            up=hidden_of(flat_rows(inputs.up)),
            product=hidden_of(flat_rows(product)),
        ),
        product,
    )
    return product


class _Backward(NamedTuple):
    grad_product: Tensor
    gate: Tensor
    up: Tensor
    activation: int


def _backward_kernel(inputs: _Backward) -> tuple[Tensor, Tensor]:
    gate, (grad_gate, grad_up) = flat_rows(inputs.gate), _gradients(inputs)
    launch(
        records.GatedActivationBackward(
            tokens=gate.shape[0],
            width=gate.shape[1],
            dtype=dtype_code(gate),
            activation=inputs.activation,
            gate=hidden_of(gate),
            up=hidden_of(flat_rows(inputs.up)),
            grad_product=hidden_of(flat_rows(inputs.grad_product)),
            grad_gate=hidden_of(flat_rows(grad_gate)),
            grad_up=hidden_of(flat_rows(grad_up)),
        ),
        grad_gate,
    )
    return grad_gate, grad_up


def _fake(inputs: Inputs) -> Tensor:
    return inputs.gate.new_empty(inputs.gate.shape)


def _gradients(inputs: _Backward) -> tuple[Tensor, Tensor]:
    return inputs.gate.new_empty(inputs.gate.shape), inputs.gate.new_empty(inputs.gate.shape)


def _save(ctx: Any, inputs: Inputs, output: Tensor) -> None:
    ctx.activation = inputs.activation
    ctx.save_for_backward(inputs.gate, inputs.up)


def _gradient(ctx: Any, grad_product: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    return _backward(_Backward(grad_product, gate, up, ctx.activation))


_backward = fused_op("gated_activation_backward", _Backward, _backward_kernel, _gradients)
implements("gated_activation", "fused")(
    fused_op("gated_activation", Inputs, _kernel, _fake, trained=("gate", "up"), save=_save, gradient=_gradient)
)
