"""Rotary position embedding (Su et al., "RoFormer", 2021), in the form that rotates the two halves of a head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._dispatch import implementation, implements, launch
from ._op import fused_op
from ._rows import accumulation_dtype, dtype_code


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, in float32 and rounded once, as Llama, Qwen, Mistral and Gemma rotate q and k.

    rotate_half maps (x_1, x_2), the halves of a head, to (-x_2, x_1). If cos and sin have R < D columns, the first R
    columns of a head are rotated and the others are copied (GPT-NeoX, Phi).

    Args:
        x: (B, heads, T, D), float, any strides. Differentiable.
        cos: (B, T, R) or (1, T, R), float, R even and at most D; as transformers' rotary embeddings return it. A
            constant, like ``sin``.
        sin: same shape and dtype.

    Returns:
        Shape and dtype of ``x``, inside autocast too. The memory layout is that of ``x``: (B, T, heads, D) if x is a
        transposed projection, else (B, heads, T, D). So is the gradient's, except on the torch backend.

    Raises:
        TypeError: an input is not a floating-point tensor, or cos and sin differ in dtype.
        ValueError: shapes or devices do not fit.
    """
    _checks.floating("rotary_embedding", x=x, cos=cos, sin=sin)
    if x.dim() != 4:
        raise ValueError(f"rotary_embedding: x must have shape (B, heads, T, D); got {tuple(x.shape)}")
    batch, _, length, width = x.shape
    if cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != length:
        raise ValueError(
            f"rotary_embedding: cos must have shape ({batch} or 1, {length}, R), by x; got {tuple(cos.shape)}"
        )
    if cos.shape[2] % 2 or cos.shape[2] > width:
        raise ValueError(
            f"rotary_embedding: cos must have an even number of columns, at most the {width} of a head; "
            f"got {cos.shape[2]}"
        )
    _checks.shaped("rotary_embedding", cos.shape, "that of cos", sin=sin)
    _checks.same_device("rotary_embedding", x=x, cos=cos, sin=sin)
    if cos.dtype != sin.dtype:
        raise TypeError(f"rotary_embedding: sin must be {cos.dtype} like cos; got {sin.dtype}")
    cos, sin = _checks.constant(cos), _checks.constant(sin)
    by_token = x.stride(1) < x.stride(2)
    return implementation("rotary_embedding", x)(Inputs(x, cos, sin, by_token, False))


class Inputs(NamedTuple):
    x: Tensor  # (B, heads, T, D); for the backward, the gradient of the result
    cos: Tensor  # (B or 1, T, R)
    sin: Tensor
    by_token: bool  # the result's memory is (B, T, heads, D), else (B, heads, T, D)
    backward: bool


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("rotary_embedding", "torch")
def _torch(inputs: Inputs) -> Tensor:
    x = inputs.x.to(accumulation_dtype(inputs.x.dtype))
    cos, sin = (angle.to(x.dtype).unsqueeze(1) for angle in (inputs.cos, inputs.sin))
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    result = torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1).to(inputs.x.dtype)
    return result.transpose(1, 2).contiguous().transpose(1, 2) if inputs.by_token else result.contiguous()


# ---- on the engines: one pass forward, one backward -----------------------------------------------------------------


def _kernel(inputs: Inputs) -> Tensor:
    x, (cos, sin), out = _unit_columns(inputs.x), _angles(inputs), _fake(inputs)
    sequences, heads, length, width = x.shape
    launch(
        records.RotaryEmbedding(
            sequences=sequences,
            heads=heads,
            length=length,
            width=width,
            turned=cos.shape[2],
            dtype=dtype_code(x),
            x=_heads(x),
            angles=records.Angles(cos, sin, dtype_code(cos), cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)),
            backward=inputs.backward,
            out=_heads(out),
        ),
        out,
    )
    return out


def _heads(x: Tensor) -> records.Heads:
    return records.Heads(x, *x.stride()[:3])


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _angles(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """cos and sin in float32 or the dtype of x, with the same strides."""
    dtype = inputs.cos.dtype if inputs.cos.dtype == inputs.x.dtype else torch.float32
    cos, sin = (_unit_columns(angle.to(dtype)) for angle in (inputs.cos, inputs.sin))
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def _fake(inputs: Inputs) -> Tensor:
    sequences, heads, length, width = inputs.x.shape
    if inputs.by_token:
        return inputs.x.new_empty((sequences, length, heads, width)).transpose(1, 2)
    return inputs.x.new_empty(inputs.x.shape)


def _save(ctx: Any, inputs: Inputs, output: Tensor) -> None:
    ctx.by_token = inputs.by_token
    ctx.save_for_backward(inputs.cos, inputs.sin)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    cos, sin = ctx.saved_tensors
    return (_backward(Inputs(grad, cos, sin, ctx.by_token, True)),)


_backward = fused_op("rotary_embedding_backward", Inputs, _kernel, _fake)
implements("rotary_embedding", "fused")(
    fused_op("rotary_embedding", Inputs, _kernel, _fake, trained=("x",), save=_save, gradient=_gradient)
)
