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
    logits_of,
    rows_of,
    unflat,
    unit_columns,
    vocabulary,
)
from ._vocab import all_dead, row_chunks, row_sum


def exact_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None = None, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """KL(policy || reference) of every live token in nats, summed over the vocabulary; 0 for the others.

    The gradient flows only to ``logits``; the reference is a constant. The sum is over p log(p / r) - p + r, whose
    terms are never negative. So the result is never negative, and it stays accurate where the two are close.

    Args:
        logits: (..., V), the policy's; float64, float32, bfloat16 or float16.
        ref_logits: (..., V), the reference's. If the dtypes differ, both are cast to their torch.promote_types.
        mask: (...), bool or 0/1, 1 = counts. The data of a masked row is never used, NaN or inf included.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        temperature: divides both; a number > 0, or a tensor () or (...) with one per row. It receives no gradient.

    Returns:
        (...), float32 (float64 when an input is). A column at -inf in both adds nothing. A column at -inf only in the
        reference gives +inf, with a NaN gradient in that row, because the KL is infinite. A live row with NaN or +inf,
        or with only -inf, is NaN; other rows are not.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or value.
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
    inputs = Inputs(as_rows(logits), as_rows(ref_logits), *shared)
    return unflat(implementation(op, logits)(inputs), shape)


class Inputs(NamedTuple):
    logits: Tensor  # (N, V), any strides
    ref_logits: Tensor
    live: Tensor | None  # this, temperatures and temperature are as in Tokens
    temperatures: Tensor | None
    temperature: float


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("exact_kl", "torch")
def reference(inputs: Inputs) -> Tensor:
    """-> (N,)."""
    _checks.differentiated_once("exact_kl")
    logits, ref_logits, live, temperatures, temperature = inputs
    return _ExactKL.apply(logits, ref_logits, *expanded(logits, live, temperatures, temperature))


class _ExactKL(torch.autograd.Function):
    """Saves both sets of logits and one number per row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, ref_logits: Tensor, live: Tensor, temperature: Tensor) -> Tensor:
        kl = logits.new_zeros(logits.shape[0], dtype=accumulation_dtype(logits.dtype))
        for rows in row_chunks(*logits.shape):
            if all_dead(live[rows]):
                continue
            log_p = _log_softmax(logits[rows], live[rows], temperature[rows], kl.dtype)
            log_r = _log_softmax(ref_logits[rows], live[rows], temperature[rows], kl.dtype)
            kl[rows] = row_sum(_terms(log_p, log_r)).masked_fill(~live[rows], 0.0)
        return kl

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        logits, ref_logits, live, temperature, kl = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
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
        return grad, None, None, None


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
    return _forward(inputs._replace(logits=logits, ref_logits=ref_logits))[0]


def _kernel(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> KL (N,), statistics (N, 4)."""
    kl, statistics = _outputs(inputs)
    launch(
        records.ExactKl(
            rows=_rows(inputs),
            logits=logits_of(inputs.logits),
            ref_logits=logits_of(inputs.ref_logits),
            kl=kl,
            statistics=statistics,
        ),
        kl,
    )
    return kl, statistics


def _rows(inputs: Inputs) -> records.Rows:
    length, vocab = inputs.logits.shape
    return rows_of(length, None, *inputs[2:], vocab=vocab, softcap=0.0)


def _outputs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    rows, empty = inputs.logits.shape[0], inputs.logits.new_empty
    return empty(rows, dtype=torch.float32), empty(rows, records.STATISTICS, dtype=torch.float32)


class _Backward(NamedTuple):
    inputs: Inputs
    kl: Tensor
    statistics: Tensor
    grad_kl: Tensor


def _backward_kernel(given: _Backward) -> Tensor:
    """-> the gradient of the logits, contiguous."""
    inputs, grad = given.inputs, _empty_gradient(given)
    launch(
        records.ExactKlBackward(
            rows=_rows(inputs),
            logits=logits_of(inputs.logits),
            ref_logits=logits_of(inputs.ref_logits),
            statistics=given.statistics,
            kl=given.kl,
            grad_kl=given.grad_kl.contiguous(),
            grad=logits_of(grad),
        ),
        grad,
    )
    return grad


def _empty_gradient(given: _Backward) -> Tensor:
    return torch.empty_like(given.inputs.logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: Inputs, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, grad_kl: Tensor, _: Tensor) -> tuple[Tensor]:
    logits, ref_logits, live, temperatures, kl, statistics = ctx.saved_tensors
    inputs = Inputs(logits, ref_logits, live, temperatures, ctx.temperature)
    return (_backward(_Backward(inputs, kl, statistics, grad_kl)),)


_backward = fused_op("exact_kl_backward", _Backward, _backward_kernel, _empty_gradient)
_forward = fused_op("exact_kl", Inputs, _kernel, _outputs, trained=("logits",), save=_save, gradient=_gradient)
