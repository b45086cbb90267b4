"""Log-probabilities of the target tokens, and optionally entropy and other statistics, from logits."""

import functools
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_fast.kernels import records
from rlhf_fast.kernels.records import RowOutputs

from . import _checks
from ._dispatch import implementation, implements, launch
from ._op import fused_op, not_differentiable
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
    RowExtras,
    RowStatistics,
    all_dead,
    cap_and_scale,
    cap_and_scale_backward,
    row_chunks,
    row_entropy,
    row_gradient,
    row_statistics,
    row_summary,
    softplus,
)


class TokenStatistics(NamedTuple):
    """What one pass over the logits tells of each token.

    All (...), 0 where masked, of the logits after softcap and temperature. A row that is NaN is NaN in all of them and
    not top-1. The first three have gradients.
    """

    logprobs: Tensor  # of the targets
    entropy: Tensor  # in nats
    logsumexp: Tensor  # log sum_j e^x_j, as in a z-loss
    mean_logit: Tensor  # the mean over the vocabulary, that of -inf included
    log_sum_squares: Tensor  # log sum_j p_j^2
    is_top1: Tensor  # bool: no logit is larger than the target's; a tie counts


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
    return_statistics: Literal[False] = False,
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
    return_statistics: Literal[False] = False,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]: ...
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
    return_entropy: bool = False,
    return_statistics: Literal[True],
    inplace_backward: bool = False,
) -> TokenStatistics: ...
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
    return_statistics: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | TokenStatistics:
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
        return_statistics: return TokenStatistics: log-probs, entropy and more, from the same pass over the logits.
        inplace_backward: the backward overwrites the logits with their gradient instead of allocating memory (logits
            whose columns are not contiguous are copied first).

    Returns:
        logprobs (...), (logprobs, entropy) or TokenStatistics, float32 (float64 for float64 logits), 0 where masked. A
        target at -inf gives -inf with a finite gradient. A live row with NaN or +inf, or with only -inf, is NaN; other
        rows are not.

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
    outputs = implementation(op, logits)(
        Inputs(rows, tokens, softcap or 0.0, vocab, return_entropy, return_statistics, inplace_backward)
    )
    return in_shape(outputs, shape)


def in_shape(outputs: RowOutputs, shape: torch.Size) -> Tensor | tuple[Tensor, Tensor] | TokenStatistics:
    """What the public functions return, in ``shape``."""
    logprobs = unflat(outputs.logprobs, shape)
    if outputs.entropy is None:
        return logprobs
    entropy = unflat(outputs.entropy, shape)
    if outputs.logsumexp is None or outputs.extras is None:
        return logprobs, entropy
    extras = RowExtras(*(unflat(extra, shape) for extra in outputs.extras.unbind(1)))
    return TokenStatistics(
        logprobs,
        entropy,
        logsumexp=unflat(outputs.logsumexp, shape),
        mean_logit=extras.mean_logit,
        log_sum_squares=extras.log_sum_squares,
        is_top1=extras.is_top1.bool(),
    )


class Inputs(NamedTuple):
    logits: Tensor  # (N, V), any strides, or (B, T, V) with contiguous columns
    tokens: Tokens
    softcap: float  # 0 = none
    vocab_size: int
    return_entropy: bool
    return_statistics: bool  # entropy included
    inplace_backward: bool


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("masked_logprobs", "torch")
def reference(inputs: Inputs) -> RowOutputs:
    _checks.differentiated_once("masked_logprobs")
    logits, tokens, softcap, *options = inputs
    logits, tokens = as_rows(logits), counted(tokens)
    live, temperature = expanded(logits, *tokens[1:4])
    outputs = _MaskedLogprobs.apply(logits, tokens.targets, live, temperature, softcap or None, *options)
    return RowOutputs(*outputs[: len(RowOutputs._fields)])


def reference_of_rows(
    logits: Tensor, targets: Tensor, temperature: Tensor, return_entropy: bool, return_statistics: bool = False
) -> RowOutputs:
    """``reference`` of logits (N, V) whose rows all count, without softcap."""
    tokens = Tokens(targets, None, temperature)
    return reference(Inputs(logits, tokens, 0.0, logits.shape[1], return_entropy, return_statistics, False))


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
        return_statistics: bool,
        inplace_backward: bool,
    ) -> tuple[Tensor | None, ...]:
        """-> the fields of RowOutputs, and those of RowStatistics."""
        zeros = logits.new_zeros(logits.shape[0], dtype=accumulation_dtype(logits.dtype))
        logprobs = zeros.clone()
        entropy = zeros.clone() if return_entropy or return_statistics else None
        logsumexp = zeros.clone() if return_statistics else None
        extras = zeros.new_zeros(logits.shape[0], len(RowExtras._fields)) if return_statistics else None
        statistics = RowStatistics(*(zeros.clone() for _ in RowStatistics._fields))
        for rows in row_chunks(logits.shape[0], vocab_size):
            if all_dead(live[rows]):
                continue
            alive = live[rows]
            raw = _live_rows(logits[rows, :vocab_size], alive, zeros.dtype)
            scaled, offset = cap_and_scale(raw, softcap, temperature[rows].masked_fill(~alive, 1.0))
            target = targets[rows].masked_fill(~alive, 0)
            chunk = row_statistics(scaled, target)
            for whole, part in zip(statistics, chunk, strict=True):
                whole[rows] = part
            logprobs[rows] = (-softplus(chunk.log_odds)).masked_fill(~alive, 0.0)
            if entropy is not None:
                entropy[rows] = row_entropy(scaled, target, chunk).masked_fill(~alive, 0.0)
            if logsumexp is not None and extras is not None:
                normaliser, columns = row_summary(scaled, target, chunk, offset)
                logsumexp[rows] = normaliser.masked_fill(~alive, 0.0)
                extras[rows] = torch.stack(columns, dim=1).masked_fill(~alive[:, None], 0.0)
        return logprobs, entropy, logsumexp, extras, *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.softcap, ctx.vocab_size, _, _, ctx.inplace_backward = inputs
        _, entropy, _, extras, *statistics = output
        ctx.spent = False
        ctx.set_materialize_grads(False)
        not_differentiable(ctx, [extras, *statistics])
        ctx.save_for_backward(*tensors, entropy, *statistics)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_logsumexp: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        refuse_spent(ctx, "masked_logprobs")
        if grad_logprobs is None and grad_entropy is None and grad_logsumexp is None:
            return (None,) * 9
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
                cap_and_scale(raw, ctx.softcap, tau)[0],
                targets[rows].masked_fill(~alive, 0),
                RowStatistics(*(part[rows] for part in saved)),
                None if grad_logprobs is None else grad_logprobs[rows],
                None if entropy is None else entropy[rows],
                None if grad_entropy is None else grad_entropy[rows],
                None if grad_logsumexp is None else grad_logsumexp[rows],
            )
            chunk = cap_and_scale_backward(chunk, raw, ctx.softcap, tau)
            grad[rows, : ctx.vocab_size] = chunk.masked_fill_(~alive[:, None], 0.0).to(logits.dtype)
        return grad, *(None,) * 8


def _live_rows(logits: Tensor, alive: Tensor, dtype: torch.dtype) -> Tensor:
    """The chunk in full precision, contiguous, with zeros in the dead rows."""
    return logits.to(dtype).masked_fill(~alive[:, None], 0.0).contiguous()


# ---- on the engines: forward and backward each read the logits once --------------------------------------------------


@implements("masked_logprobs", "fused")
def _fused(inputs: Inputs) -> RowOutputs:
    logits = unit_columns(inputs.logits)
    # Under torch.compile the compiler allocates the gradient, and a graph must not write to its inputs.
    inplace = inputs.inplace_backward and not torch.compiler.is_compiling()
    if logits is not inputs.logits or inplace != inputs.inplace_backward:
        inputs = inputs._replace(logits=logits, inplace_backward=inplace)
    logprobs, entropy, logsumexp, extras, _ = _forward(inputs)
    if inputs.return_statistics:
        return RowOutputs(logprobs, entropy, logsumexp, extras)
    return RowOutputs(logprobs, entropy if inputs.return_entropy else None)


def _kernel(inputs: Inputs) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """-> the fields of RowOutputs, and statistics (N, 4)."""
    logprobs, entropy, logsumexp, extras, statistics = _outputs(inputs)
    launch(
        records.MaskedLogprobs(
            rows=rows_of(statistics.shape[0], *inputs.tokens, vocab=inputs.vocab_size, softcap=inputs.softcap),
            logits=logits_of(inputs.logits),
            outputs=RowOutputs(logprobs, entropy, logsumexp, extras),
            statistics=statistics,
        ),
        statistics,
    )
    return logprobs, entropy, logsumexp, extras, statistics


def _outputs(inputs: Inputs) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    rows = inputs.tokens.targets.shape[0]
    outputs = empty_outputs(inputs.logits, rows, inputs.return_entropy, inputs.return_statistics)
    return *outputs, inputs.logits.new_empty(rows, records.STATISTICS, dtype=torch.float32)


def empty_outputs(like: Tensor, rows: int, return_entropy: bool, return_statistics: bool) -> RowOutputs:
    """Uninitialised, of ``rows`` rows."""
    empty = functools.partial(like.new_empty, dtype=torch.float32)
    entropy = empty(rows) if return_entropy or return_statistics else None
    if not return_statistics:
        return RowOutputs(empty(rows), entropy)
    return RowOutputs(empty(rows), entropy, empty(rows), empty(rows, records.EXTRAS))


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
    grad_logsumexp: Tensor | None


def _backward_kernel(inputs: _Backward) -> None:
    """Writes the gradient into ``grad``."""
    grads = (inputs.grad_logprobs, inputs.grad_entropy, inputs.grad_logsumexp)
    grad_logprobs, grad_entropy, grad_logsumexp = (None if grad is None else grad.contiguous() for grad in grads)
    launch(
        records.MaskedLogprobsBackward(
            rows=rows_of(inputs.logprobs.shape[0], *inputs.tokens, vocab=inputs.vocab_size, softcap=inputs.softcap),
            logits=logits_of(inputs.grad if inputs.logits is None else inputs.logits),
            columns=inputs.grad.shape[-1],
            statistics=inputs.statistics,
            logprobs=inputs.logprobs,
            entropy=inputs.entropy,
            grad_logprobs=grad_logprobs,
            grad_entropy=grad_entropy,
            grad_logsumexp=grad_logsumexp,
            grad=logits_of(inputs.grad),
        ),
        inputs.grad,
    )


_backward = fused_op("masked_logprobs_backward", _Backward, _backward_kernel, lambda inputs: None, mutates="grad")


def _save(ctx: Any, inputs: Inputs, output: tuple[Tensor, ...]) -> None:
    logits, tokens, ctx.softcap, ctx.vocab_size, return_entropy, ctx.return_statistics, ctx.inplace_backward = inputs
    ctx.return_entropy = return_entropy or ctx.return_statistics
    ctx.set_materialize_grads(False)
    ctx.spent = False
    *tensors, ctx.temperature, ctx.ignore_index = tokens
    logprobs, entropy, *_, statistics = output
    ctx.save_for_backward(logits, *tensors, logprobs, entropy, statistics)


def _gradient(
    ctx: Any,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None]:
    refuse_spent(ctx, "masked_logprobs")
    if grad_logprobs is None and grad_entropy is None and grad_logsumexp is None:
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
            grad_logsumexp=grad_logsumexp if ctx.return_statistics else None,
        )
    )
    return (grad,)


_forward = fused_op(
    "masked_logprobs", Inputs, _kernel, _outputs, trained=("logits",), constants=2, save=_save, gradient=_gradient
)
