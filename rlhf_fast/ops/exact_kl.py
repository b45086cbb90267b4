"""The Kullback-Leibler divergence over the whole vocabulary, from two sets of logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels import records

from . import _checks
from ._dispatch import implementation, implements, launch
from ._op import fused_op
from ._rows import (
    accumulation_dtype,
    as_rows,
    expanded,
    flat,
    flat_temperature,
    gradient_memory,
    in_batches,
    logits_of,
    refuse_spent,
    rows_in,
    rows_of,
    unflat,
    unit_columns,
    vocabulary,
)
from ._vocab import all_dead, row_chunks, row_sum


def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
) -> Tensor:
    """KL(policy || reference) of every live token in nats, summed over the vocabulary; 0 for the others.

    The gradient flows only to ``logits``; the reference is a constant. The sum is over p log(p / r) - p + r, whose
    terms are never negative. So the result is never negative, and it stays accurate where the two are close.

    Args:
        logits: (..., V), the policy's; float64, float32, bfloat16 or float16. A slice such as
            ``logits[:, start:stop]`` is read where it lies.
        ref_logits: (..., V), the reference's. If the dtypes differ, both are cast to their torch.promote_types.
        mask: (...), bool or 0/1, 1 = counts. The data of a masked row is never used, NaN or inf included.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        temperature: divides both; a number > 0, or a tensor () or (...) with one per row. It receives no gradient.
        inplace_backward: the backward overwrites the logits with their gradient instead of allocating memory (logits
            whose columns are not contiguous, or not of the common dtype, are copied first).

    Returns:
        (...), float32 (float64 when an input is). A column at -inf in both adds nothing. A column at -inf only in the
        reference gives +inf, with a NaN gradient in that row, because the KL is infinite. A live row with NaN or +inf,
        or with only -inf, is NaN; other rows are not.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or value.
        RuntimeError: in the backward, when the logits were modified since the forward, or on a second backward with
            ``inplace_backward``.
    """
    op = "exact_kl"
    _checks.floating(op, logits=logits, ref_logits=ref_logits)
    if logits.dim() < 1:
        raise ValueError(f"{op}: logits must have shape (..., V); got a tensor without dimensions")
    _checks.shaped(op, logits.shape, "that of logits", ref_logits=ref_logits)
    _checks.same_device(op, logits=logits, ref_logits=ref_logits)
    if logits.dtype != ref_logits.dtype:
        wider = torch.promote_types(logits.dtype, ref_logits.dtype)
        logits, ref_logits = logits.to(wider), ref_logits.to(wider)
    vocabulary(op, logits.shape[-1], None)
    shape = logits.shape[:-1]
    live = _checks.live_mask(op, mask, shape, logits.device)
    if live is not None:
        live = flat(live)
    shared = (live, *flat_temperature(op, temperature, logits))
    ref_logits = _checks.constant(ref_logits)
    rows, ref_rows = in_batches(logits, ref_logits, inplace=inplace_backward)
    inputs = Inputs(rows, ref_rows, *shared, inplace_backward)
    return unflat(implementation(op, logits)(inputs), shape)


class Inputs(NamedTuple):
    logits: Tensor  # (N, V), any strides, or (B, T, V) with contiguous columns
    ref_logits: Tensor
    live: Tensor | None  # this, temperatures and temperature are as in Tokens
    temperatures: Tensor | None
    temperature: float
    inplace_backward: bool = False


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("exact_kl", "torch")
def reference(inputs: Inputs) -> Tensor:
    """-> (N,)."""
    _checks.differentiated_once("exact_kl")
    logits, ref_logits, live, temperatures, temperature, inplace_backward = inputs
    logits, ref_logits = as_rows(logits), as_rows(ref_logits)
    of_rows = expanded(logits, live, temperatures, temperature)
    return _ExactKL.apply(logits, ref_logits, *of_rows, inplace_backward)


class _ExactKL(torch.autograd.Function):
    """Saves both sets of logits and one number per row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, ref_logits: Tensor, live: Tensor, temperature: Tensor, inplace_backward: bool
    ) -> Tensor:
        kl = logits.new_zeros(logits.shape[0], dtype=accumulation_dtype(logits.dtype))
        for rows in row_chunks(*logits.shape):
            if all_dead(live[rows]):
                continue
            log_p = _log_softmax(logits[rows], live[rows], temperature[rows], kl.dtype)
            log_r = _log_softmax(ref_logits[rows], live[rows], temperature[rows], kl.dtype)
            kl[rows] = row_sum(_terms(log_p, log_r)).masked_fill(~live[rows], 0.0)
        return kl

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.inplace_backward = inputs
        ctx.spent = False
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        refuse_spent(ctx, "exact_kl")
        logits, ref_logits, live, temperature, kl = ctx.saved_tensors
        grad = gradient_memory(ctx, logits)
        for rows in row_chunks(*logits.shape):
            alive = live[rows]
            if all_dead(alive):
                grad[rows] = 0
                continue
            log_p = _log_softmax(logits[rows], alive, temperature[rows], kl.dtype)
            log_r = _log_softmax(ref_logits[rows], alive, temperature[rows], kl.dtype)
            p = torch.exp(log_p)
            # d KL / d x_j = p_j (log p_j - log r_j - KL)
            chunk = p * (log_p - log_r - kl[rows, None])
            chunk = chunk.masked_fill(p == 0, 0.0) * (grad_kl[rows] / temperature[rows])[:, None]
            grad[rows] = chunk.masked_fill(~alive[:, None], 0.0).to(grad.dtype)
        return grad, None, None, None, None


def _terms(log_p: Tensor, log_r: Tensor) -> Tensor:
    """p log(p / r) - p + r, element by element."""
    p, r = torch.exp(log_p), torch.exp(log_r)
    ratio = log_r - log_p
    # Where p and r are close, p log(p / r) - p + r cancels; expm1 avoids that. A large e^ratio would overflow.
    terms = torch.where(ratio <= 1, p * (torch.expm1(ratio) - ratio), r - p - p * ratio)
    return torch.where(p == 0, r, terms)


def _log_softmax(logits: Tensor, alive: Tensor, temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.log_softmax in ``dtype``, with three differences: masked rows are not read, the row sum has a fixed order,
    and the largest column is left out of the sum and enters through log1p, so that a log p close to 0 stays accurate.
    """
    logits = logits.to(dtype).masked_fill(~alive[:, None], 0.0).contiguous()
    top = logits.argmax(dim=1, keepdim=True)
    shifted = (logits - logits.gather(1, top)) / temperature.masked_fill(~alive, 1.0)[:, None]
    # at the largest column, shifted is 0, or NaN if the row's result is NaN
    others = torch.exp(shifted).scatter(1, top, shifted.gather(1, top))
    return shifted - torch.log1p(row_sum(others))[:, None]


# ---- on the engines: forward reads both logits twice (the second time from a CPU's cache), backward once ------------


@implements("exact_kl", "fused")
def _fused(inputs: Inputs) -> Tensor:
    logits, ref_logits = unit_columns(inputs.logits), unit_columns(inputs.ref_logits)
    # Under torch.compile the compiler allocates the gradient, and a graph must not write to its inputs.
    inplace = inputs.inplace_backward and not torch.compiler.is_compiling()
    return _forward(inputs._replace(logits=logits, ref_logits=ref_logits, inplace_backward=inplace))[0]


def _kernel(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> KL (N,), statistics (N, 4)."""
    kl, statistics = _outputs(inputs)
    launch(
        records.ExactKl(
            rows=_rows(inputs.logits, *inputs[2:5]),
            logits=logits_of(inputs.logits),
            ref_logits=logits_of(inputs.ref_logits),
            kl=kl,
            statistics=statistics,
        ),
        kl,
    )
    return kl, statistics


def _rows(logits: Tensor, live: Tensor | None, temperatures: Tensor | None, temperature: float) -> records.Rows:
    return rows_of(rows_in(logits), None, live, temperatures, temperature, vocab=logits.shape[-1], softcap=0.0)


def _outputs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    rows, empty = rows_in(inputs.logits), inputs.logits.new_empty
    return empty(rows, dtype=torch.float32), empty(rows, records.STATISTICS, dtype=torch.float32)


class _Backward(NamedTuple):
    grad: Tensor  # like the logits; holds the logits if ``logits`` is None, and is overwritten in place
    logits: Tensor | None
    ref_logits: Tensor
    live: Tensor | None
    temperatures: Tensor | None
    temperature: float
    kl: Tensor
    statistics: Tensor
    grad_kl: Tensor


def _backward_kernel(inputs: _Backward) -> None:
    """Writes the gradient into ``grad``."""
    grad = inputs.grad
    launch(
        records.ExactKlBackward(
            rows=_rows(grad, inputs.live, inputs.temperatures, inputs.temperature),
            logits=logits_of(grad if inputs.logits is None else inputs.logits),
            ref_logits=logits_of(inputs.ref_logits),
            statistics=inputs.statistics,
            kl=inputs.kl,
            grad_kl=inputs.grad_kl.contiguous(),
            grad=logits_of(grad),
        ),
        grad,
    )


def _save(ctx: Any, inputs: Inputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    *tensors, ctx.temperature, ctx.inplace_backward = inputs
    ctx.spent = False
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, grad_kl: Tensor, _: Tensor) -> tuple[Tensor]:
    refuse_spent(ctx, "exact_kl")
    logits, ref_logits, live, temperatures, kl, statistics = ctx.saved_tensors
    grad = gradient_memory(ctx, logits)
    _backward(
        _Backward(
            grad=grad,
            logits=None if ctx.inplace_backward else logits,
            ref_logits=ref_logits,
            live=live,
            temperatures=temperatures,
            temperature=ctx.temperature,
            kl=kl,
            statistics=statistics,
            grad_kl=grad_kl,
        )
    )
    return (grad,)


_backward = fused_op("exact_kl_backward", _Backward, _backward_kernel, lambda inputs: None, mutates="grad")
_forward = fused_op("exact_kl", Inputs, _kernel, _outputs, trained=("logits",), save=_save, gradient=_gradient)
