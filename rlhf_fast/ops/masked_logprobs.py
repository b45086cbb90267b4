"""Log-probabilities of the target tokens, and optionally the entropy, from logits."""

import functools
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels import records

from . import _checks
from ._dispatch import implementation, implements, launch
from ._op import fused_op
from ._rows import (
    Tokens,
    accumulation_dtype,
    as_rows,
    counted,
    expanded,
    gradient_memory,
    in_batches,
    logits_of,
    refuse_spent,
    rows_of,
    tokens_for_kernel,
    unflat,
    unit_columns,
    vocabulary,
)
from ._vocab import (
    RowStatistics,
    all_dead,
    cap_and_scale,
    cap_and_scale_backward,
    row_chunks,
    row_entropy,
    row_gradient,
    row_statistics,
    softplus,
)


@overload
def masked_logprobs(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: Literal[False] = False,
    inplace_backward: bool = False,
) -> Tensor: ...
@overload
def masked_logprobs(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: Literal[True],
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]: ...
def masked_logprobs(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits)[target] for every live token, 0 for the others.

    The softmax is over softcap * tanh(logits / softcap) / temperature. A confident token (p -> 1) keeps its relative
    precision, in its log-probability and in its gradient.

    Args:
        logits: (..., V), float64, float32, bfloat16 or float16. A slice such as ``logits[:, start:stop]`` is read
            where it lies.
        targets: (...), integer token ids, not shifted by this function: row t holds the logits that predict target t.
        mask: (...), bool or 0/1, 1 = counts. The data of a masked row is never used, NaN or inf included.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        temperature: a number > 0, or a tensor () or (...) with one per row. It receives no gradient.
        softcap: the cap of the model's own logit soft-capping, > 0. It turns -inf into -softcap and +inf into
            softcap, as in the model.
        vocab_size: columns from this index on are padding: not in the softmax, gradient 0.
        ignore_index: a target with this value is masked.
        return_entropy: also return the entropy of each live row in nats, which has a gradient too.
        inplace_backward: the backward overwrites the logits with their gradient instead of allocating memory (logits
            whose columns are not contiguous are copied first).

    Returns:
        logprobs (...) or (logprobs, entropy), float32 (float64 for float64 logits), 0 where masked. A target at -inf
        gives -inf with a finite gradient. A live row with NaN or +inf, or with only -inf, is NaN; other rows are not.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or value.
        IndexError: on the CPU, a live target outside the vocabulary; on a GPU its row is NaN.
        RuntimeError: in the backward, when the logits were modified since the forward, or on a second backward with
            ``inplace_backward``.
    """
    op = "masked_logprobs"
    _checks.floating(op, logits=logits)
    if logits.dim() < 1:
        raise ValueError(f"{op}: logits must have shape (..., V); got a tensor without dimensions")
    _checks.positive(op, softcap=softcap)
    vocab = vocabulary(op, logits.shape[-1], vocab_size)
    tokens = tokens_for_kernel(
        op, logits, targets, mask, temperature=temperature, vocab=vocab, ignore_index=ignore_index
    )
    shape = logits.shape[:-1]
    (rows,) = in_batches(logits, inplace=inplace_backward)
    logprobs, entropy = implementation(op, logits)(
        Inputs(rows, tokens, softcap or 0.0, vocab, return_entropy, inplace_backward)
    )
    return (unflat(logprobs, shape), unflat(entropy, shape)) if return_entropy else unflat(logprobs, shape)


class Inputs(NamedTuple):
    logits: Tensor  # (N, V), any strides, or (B, T, V) with contiguous columns
    tokens: Tokens
    softcap: float  # 0 = none
    vocab_size: int
    return_entropy: bool
    inplace_backward: bool


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("masked_logprobs", "torch")
def reference(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """-> logprobs (N,), entropy (N,)."""
    _checks.differentiated_once("masked_logprobs")
    logits, tokens, softcap, *options = inputs
    logits, tokens = as_rows(logits), counted(tokens)
    live, temperature = expanded(logits, *tokens[1:4])
    logprobs, entropy, *_ = _MaskedLogprobs.apply(logits, tokens.targets, live, temperature, softcap or None, *options)
    return logprobs, entropy


def reference_of_rows(
    logits: Tensor, targets: Tensor, temperature: Tensor, return_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """``reference`` of logits (N, V) whose rows all count, without softcap."""
    tokens = Tokens(targets, None, temperature)
    return reference(Inputs(logits, tokens, 0.0, logits.shape[1], return_entropy, False))


class _MaskedLogprobs(torch.autograd.Function):
    """Saves the logits and three or four numbers per row; the backward recomputes the softmax, chunk by chunk."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        targets: Tensor,
        live: Tensor,
        temperature: Tensor,
        softcap: float | None,
        vocab_size: int,
        return_entropy: bool,
        inplace_backward: bool,
    ) -> tuple[Tensor | None, ...]:
        """-> logprobs, entropy, and the fields of RowStatistics."""
        zeros = logits.new_zeros(logits.shape[0], dtype=accumulation_dtype(logits.dtype))
        logprobs = zeros.clone()
        entropy = zeros.clone() if return_entropy else None
        statistics = RowStatistics(*(zeros.clone() for _ in RowStatistics._fields))
        for rows in row_chunks(logits.shape[0], vocab_size):
            if all_dead(live[rows]):
                continue
            alive = live[rows]
            raw = _live_rows(logits[rows, :vocab_size], alive, zeros.dtype)
            scaled = cap_and_scale(raw, softcap, temperature[rows].masked_fill(~alive, 1.0))
            target = targets[rows].masked_fill(~alive, 0)
            chunk = row_statistics(scaled, target)
            for whole, part in zip(statistics, chunk, strict=True):
                whole[rows] = part
            logprobs[rows] = (-softplus(chunk.log_odds)).masked_fill(~alive, 0.0)
            if entropy is not None:
                entropy[rows] = row_entropy(scaled, target, chunk).masked_fill(~alive, 0.0)
        return logprobs, entropy, *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.softcap, ctx.vocab_size, _, ctx.inplace_backward = inputs
        ctx.spent = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        refuse_spent(ctx, "masked_logprobs")
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        logits, targets, live, temperature, entropy, *saved = ctx.saved_tensors
        grad = gradient_memory(ctx, logits)
        for rows in row_chunks(logits.shape[0], ctx.vocab_size):
            alive = live[rows]
            grad[rows, ctx.vocab_size :] = 0
            if all_dead(alive):
                grad[rows] = 0
                continue
            raw = _live_rows(logits[rows, : ctx.vocab_size], alive, saved[0].dtype)
            tau = temperature[rows].masked_fill(~alive, 1.0)
            chunk = row_gradient(
                cap_and_scale(raw, ctx.softcap, tau),
                targets[rows].masked_fill(~alive, 0),
                RowStatistics(*(part[rows] for part in saved)),
                None if grad_logprobs is None else grad_logprobs[rows],
                None if entropy is None else entropy[rows],
                None if grad_entropy is None else grad_entropy[rows],
            )
            chunk = cap_and_scale_backward(chunk, raw, ctx.softcap, tau)
            grad[rows, : ctx.vocab_size] = chunk.masked_fill_(~alive[:, None], 0.0).to(logits.dtype)
        return grad, *(None,) * 7


def _live_rows(logits: Tensor, alive: Tensor, dtype: torch.dtype) -> Tensor:
    """The chunk in full precision, contiguous, with zeros in the dead rows."""
    return logits.to(dtype).masked_fill(~alive[:, None], 0.0).contiguous()


# ---- on the engines: forward and backward each read the logits once --------------------------------------------------


@implements("masked_logprobs", "fused")
def _fused(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    logits = unit_columns(inputs.logits)
    # Under torch.compile the compiler allocates the gradient, and a graph must not write to its inputs.
    inplace = inputs.inplace_backward and not torch.compiler.is_compiling()
    if logits is not inputs.logits or inplace != inputs.inplace_backward:
        inputs = inputs._replace(logits=logits, inplace_backward=inplace)
    logprobs, entropy, _ = _forward(inputs)
    return logprobs, entropy if inputs.return_entropy else None


def _kernel(inputs: Inputs) -> tuple[Tensor, Tensor | None, Tensor]:
    """-> logprobs (N,), entropy (N,), statistics (N, 4)."""
    logprobs, entropy, statistics = _outputs(inputs)
    launch(
        records.MaskedLogprobs(
            rows=rows_of(logprobs.shape[0], *inputs.tokens, vocab=inputs.vocab_size, softcap=inputs.softcap),
            logits=logits_of(inputs.logits),
            logprobs=logprobs,
            entropy=entropy,
            statistics=statistics,
        ),
        logprobs,
    )
    return logprobs, entropy, statistics


def _outputs(inputs: Inputs) -> tuple[Tensor, Tensor | None, Tensor]:
    rows, empty = inputs.tokens.targets.shape[0], functools.partial(inputs.logits.new_empty, dtype=torch.float32)
    return empty(rows), empty(rows) if inputs.return_entropy else None, empty(rows, records.STATISTICS)


class _Backward(NamedTuple):
    grad: Tensor  # like the logits; holds the logits if ``logits`` is None, and is overwritten in place
    logits: Tensor | None
    tokens: Tokens
    softcap: float
    vocab_size: int
    statistics: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None


def _backward_kernel(inputs: _Backward) -> None:
    """Writes the gradient into ``grad``."""
    grad_logprobs, grad_entropy = inputs.grad_logprobs, inputs.grad_entropy
    launch(
        records.MaskedLogprobsBackward(
            rows=rows_of(inputs.logprobs.shape[0], *inputs.tokens, vocab=inputs.vocab_size, softcap=inputs.softcap),
            logits=logits_of(inputs.grad if inputs.logits is None else inputs.logits),
            columns=inputs.grad.shape[-1],
            statistics=inputs.statistics,
            logprobs=inputs.logprobs,
            entropy=inputs.entropy,
            grad_logprobs=None if grad_logprobs is None else grad_logprobs.contiguous(),
            grad_entropy=None if grad_entropy is None else grad_entropy.contiguous(),
            grad=logits_of(inputs.grad),
        ),
        inputs.grad,
    )


_backward = fused_op("masked_logprobs_backward", _Backward, _backward_kernel, lambda inputs: None, mutates="grad")


def _save(ctx: Any, inputs: Inputs, output: tuple[Tensor, ...]) -> None:
    logits, tokens, ctx.softcap, ctx.vocab_size, ctx.return_entropy, ctx.inplace_backward = inputs
    ctx.set_materialize_grads(False)
    ctx.spent = False
    *tensors, ctx.temperature, ctx.ignore_index = tokens
    ctx.save_for_backward(logits, *tensors, *output)


def _gradient(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None]:
    refuse_spent(ctx, "masked_logprobs")
    if grad_logprobs is None and grad_entropy is None:
        return (None,)
    logits, targets, live, temperatures, logprobs, entropy, statistics = ctx.saved_tensors
    grad = gradient_memory(ctx, logits)
    _backward(
        _Backward(
            grad=grad,
            logits=None if ctx.inplace_backward else logits,
            tokens=Tokens(targets, live, temperatures, ctx.temperature, ctx.ignore_index),
            softcap=ctx.softcap,
            vocab_size=ctx.vocab_size,
            statistics=statistics,
            logprobs=logprobs,
            entropy=entropy if ctx.return_entropy else None,
            grad_logprobs=grad_logprobs,
            grad_entropy=grad_entropy if ctx.return_entropy else None,
        )
    )
    return (grad,)


_forward = fused_op(
    "masked_logprobs", Inputs, _kernel, _outputs, trained=("logits",), constants=1, save=_save, gradient=_gradient
)
