"""Log-probabilities of the target tokens from hidden states, without ever storing all logits."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rlhf_fast.kernels import records
from rlhf_fast.kernels.records import RowOutputs

from . import _checks
from ._dispatch import implementation, implements, launch
from ._linear import Head, Inputs, LoRA, checked_head, in_full_precision, over_live_rows, project
from ._op import fused_op, not_differentiable
from ._rows import NOTHING, Tokens, as_rows, expanded, flat_tokens, logits_of
from ._sweep import TRAINED, HeadGradients, LiveRows, empty_gradients, sweep, wanted, wanted_dtypes
from .masked_logprobs import TokenStatistics, empty_outputs, in_shape, reference_of_rows


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: Literal[False] = False,
    return_statistics: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: Literal[True],
    return_statistics: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_statistics: Literal[True],
) -> TokenStatistics: ...
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | TokenStatistics:
    """log softmax(hidden weight^T + bias)[target] for every live token, 0 for the others.

    Masked tokens are not computed. Logits are computed in full precision (float32, float64 for float64), capped, then
    divided by the temperature. A frozen weight needs no gradient product; the gradient of a trained weight is summed
    in full precision and rounded once.

    Args:
        hidden: (..., H), float64, float32, bfloat16 or float16.
        weight: (V, H), dtype of hidden; inside torch.autocast both are cast to its dtype, as F.linear does.
        targets: (...), integer token ids, not shifted by this function: row t is the state that predicts target t.
        mask: (...), bool or 0/1, 1 = counts. The data of a masked row is never used, NaN or inf included.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        bias: (V,).
        lora: an adapter on the head, (A (r, H), B (V, r), scale): logits gain scale * (hidden A^T) B^T.
        temperature: a number > 0, or a tensor () or (...) with one per row. It receives no gradient.
        softcap: the cap of the model's own logit soft-capping, > 0.
        vocab_size: rows of weight from this index on are padding: not in the softmax, gradient 0.
        ignore_index: a target with this value is masked.
        return_entropy: also return the entropy of each live row in nats, which has a gradient too.
        return_statistics: return TokenStatistics: log-probs, entropy and more, of the same logits.

    Returns:
        logprobs (...), (logprobs, entropy) or TokenStatistics, float32 (float64 for float64 hidden), 0 where masked.
        NaN or inf in a live row of hidden gives NaN in that row only.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or value.
        IndexError: on the CPU, a live target outside the vocabulary; on a GPU its row is NaN.
    """
    op = "linear_logprobs"
    hidden, head = checked_head(op, hidden, weight, bias, lora, vocab_size)
    _checks.positive(op, softcap=softcap)
    tokens = flat_tokens(
        op, hidden, targets, mask, temperature=temperature, vocab=head.weight.shape[0], ignore_index=ignore_index
    )
    inputs = Inputs(as_rows(hidden), head, tokens, softcap or 0.0)
    return in_shape(implementation(op, hidden)(inputs, return_entropy, return_statistics), hidden.shape[:-1])


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("linear_logprobs", "torch")
def reference(inputs: Inputs, return_entropy: bool, return_statistics: bool = False) -> RowOutputs:
    head = in_full_precision(inputs.head, inputs.hidden)
    targets = inputs.tokens.targets
    live, temperature = expanded(inputs.hidden, *inputs.tokens[1:4])

    def chunk(hidden: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        logits = project(hidden, head, inputs.softcap or None)
        outputs = reference_of_rows(logits, targets, temperature, return_entropy, return_statistics)
        return tuple(output for output in outputs if output is not None)

    outputs = over_live_rows(chunk, live, head, inputs.hidden, targets, temperature)
    return RowOutputs(*outputs)


# ---- on the engines -------------------------------------------------------------------------------------------------
#
# With a frozen head, the forward also computes d logprob / d hidden of every row, while it has the logits, and the
# backward only scales it: two matrix products in all. Otherwise the backward recomputes the logits.


@implements("linear_logprobs", "fused")
def fused(inputs: Inputs, return_entropy: bool, return_statistics: bool = False, *, ahead: bool = True) -> RowOutputs:
    """``ahead`` allows the forward to compute the gradient. It is wasted if another output gets a gradient too."""
    wants = wanted(inputs.hidden, inputs.head)
    ahead = ahead and wants[0] and not any(wants[1:])
    logprobs, entropy, logsumexp, extras, _ = _forward(_Forward(inputs, return_entropy, return_statistics, ahead))
    if return_statistics:
        return RowOutputs(logprobs, entropy, logsumexp, extras)
    return RowOutputs(logprobs, entropy if return_entropy else None)


class _Forward(NamedTuple):
    inputs: Inputs
    return_entropy: bool
    return_statistics: bool  # entropy included
    ahead: bool


def _only_hidden(want: bool) -> list[bool]:
    return [want, False, False, False, False]


def _kernel(given: _Forward) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> the fields of RowOutputs, and with ``ahead`` d logprobs / d hidden (N, H)."""
    hidden, head, tokens, softcap = given.inputs
    rows = LiveRows(tokens, softcap)
    outputs = empty_outputs(hidden, rows.count, given.return_entropy, given.return_statistics)

    def fold(part: slice, logits: tuple[Tensor, ...], grad: Tensor | None) -> None:
        launch(
            records.LinearLogprobs(
                rows=rows.part(part, logits[0]),
                logits=logits_of(logits[0]),
                outputs=_part_of(outputs, part),
                grad=NOTHING if grad is None else logits_of(grad),
                grad_logprobs=None,
                grad_entropy=None,
                grad_logsumexp=None,
            ),
            outputs.logprobs,
        )

    slopes = sweep(head, (rows.take(hidden),), fold, _only_hidden(given.ahead)).hidden
    logprobs, entropy, logsumexp, extras = outputs
    return rows.put(logprobs), rows.put(entropy), rows.put(logsumexp), rows.put(extras), rows.put(slopes)


def _part_of(outputs: RowOutputs, part: slice) -> RowOutputs:
    logprobs, *others = outputs
    return RowOutputs(logprobs[part], *(None if other is None else other[part] for other in others))


def _fake(given: _Forward) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    hidden = given.inputs.hidden
    outputs = empty_outputs(hidden, hidden.shape[0], given.return_entropy, given.return_statistics)
    return *outputs, empty_gradients(hidden, given.inputs.head, _only_hidden(given.ahead)).hidden


class _Backward(NamedTuple):
    inputs: Inputs
    grad_logprobs: Tensor
    grad_entropy: Tensor | None
    grad_logsumexp: Tensor | None
    wants: list[bool]


def _backward_kernel(given: _Backward) -> HeadGradients:
    """Recomputes the logits."""
    hidden, head, tokens, softcap = given.inputs
    rows = LiveRows(tokens, softcap)
    slopes = rows.take(given.grad_logprobs)
    entropy_slopes = None if given.grad_entropy is None else rows.take(given.grad_entropy)
    logsumexp_slopes = None if given.grad_logsumexp is None else rows.take(given.grad_logsumexp)
    unused = hidden.new_empty(rows.count, dtype=torch.float32)

    def fold(part: slice, logits: tuple[Tensor, ...], grad: Tensor | None) -> None:
        assert grad is not None  # a backward always wants a gradient
        launch(
            records.LinearLogprobs(
                rows=rows.part(part, logits[0]),
                logits=logits_of(logits[0]),
                outputs=RowOutputs(unused[part]),
                grad=logits_of(grad),
                grad_logprobs=slopes[part],
                grad_entropy=None if entropy_slopes is None else entropy_slopes[part],
                grad_logsumexp=None if logsumexp_slopes is None else logsumexp_slopes[part],
            ),
            unused,
        )

    grads = sweep(head, (rows.take(hidden),), fold, given.wants)
    return grads._replace(hidden=rows.put(grads.hidden))


def _backward_fake(given: _Backward) -> HeadGradients:
    return empty_gradients(given.inputs.hidden, given.inputs.head, given.wants)


def _save(ctx: Any, given: _Forward, output: tuple[Tensor, ...]) -> None:
    (hidden, head, tokens, ctx.softcap), return_entropy, ctx.return_statistics, ctx.ahead = given
    ctx.return_entropy = return_entropy or ctx.return_statistics
    ctx.dtype, ctx.scale = hidden.dtype, head.scale
    not_differentiable(ctx, output[3 if ctx.return_statistics else 2 if return_entropy else 1 :])
    ctx.set_materialize_grads(False)
    # if entropy or logsumexp gets a gradient, the backward recomputes the logits
    again = ctx.return_entropy or not ctx.ahead
    targets, live, temperatures, ctx.temperature, _ = tokens
    saved = (hidden, *head[:4], targets, temperatures) if again else ()
    ctx.save_for_backward(live, output[-1], *saved)


def _gradient(
    ctx: Any,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    live, slopes, *saved = ctx.saved_tensors
    grad_entropy = grad_entropy if ctx.return_entropy else None
    grad_logsumexp = grad_logsumexp if ctx.return_statistics else None
    others = [grad for grad in (grad_entropy, grad_logsumexp) if grad is not None]
    if grad_logprobs is None:
        if not others:
            return (None,) * len(TRAINED)
        grad_logprobs = torch.zeros_like(others[0])
    if ctx.ahead and not others:
        if live is not None:
            grad_logprobs = torch.where(live, grad_logprobs, 0.0)
        return (grad_logprobs[:, None] * slopes).to(ctx.dtype), None, None, None, None
    hidden, weight, bias, down, up, targets, temperatures = saved
    head = Head(weight, bias, down, up, ctx.scale)
    wants = list(ctx.needs)
    inputs = Inputs(hidden, head, Tokens(targets, live, temperatures, ctx.temperature), ctx.softcap)
    grads = _backward(_Backward(inputs, grad_logprobs, grad_entropy, grad_logsumexp, wants))
    dtypes = wanted_dtypes(hidden, head, wants)
    return tuple(None if dtype is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


_trained = tuple(f"inputs.{path}" for path in TRAINED)
_backward = fused_op("linear_logprobs_backward", _Backward, _backward_kernel, _backward_fake)
_forward = fused_op("linear_logprobs", _Forward, _kernel, _fake, trained=_trained, save=_save, gradient=_gradient)
