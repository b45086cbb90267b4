"""Cross-entropy of labels from hidden states, the loss of supervised fine-tuning, without ever storing all logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records
from rlhf_fast.kernels.records import RowOutputs

from . import _checks
from ._aggregate import check_aggregation, reduced, token_weights
from ._dispatch import implementation, implements, launch
from ._linear import Inputs, LoRA, checked_head
from ._op import fused_op, not_differentiable
from ._rows import NOTHING, as_rows, flat_tokens, logits_of, unflat
from ._sweep import TRAINED, LiveRows, empty_gradients, scaled, sweep, wanted, wanted_dtypes
from .linear_logprobs import fused as linear_logprobs_fused
from .linear_logprobs import reference as linear_logprobs_reference

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """-log softmax(hidden weight^T + bias)[label], reduced, without ever storing all logits.

    Labels are not shifted by this function: row t of hidden is the state that predicts labels[t]. For a causal model,
    pass ``hidden[:, :-1]`` and ``labels[:, 1:]``.

    Args:
        hidden: (..., H), float64, float32, bfloat16 or float16.
        weight: (V, H), dtype of hidden; inside torch.autocast both are cast to its dtype, as F.linear does.
        labels: (...), integer token ids; a row with ``ignore_index`` does not count and is not computed.
        bias, lora, temperature, softcap, vocab_size: as in ``linear_logprobs``.
        reduction: "mean" over the labels that count, "sum", or "none" for (...).
        num_items: replaces the count of this call's labels as the divisor of "mean": the count of the whole batch, if
            the batch is split over accumulation steps or ranks. A number or a 0-dim tensor.

    Returns:
        0-dim (or (...) for "none"), float32 (float64 for float64 hidden). If no label counts, 0 with zero gradients.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or value.
        IndexError: on the CPU, a label outside the vocabulary; on a GPU its row is NaN.
    """
    op = "linear_cross_entropy"
    _checks.one_of(op, "reduction", reduction, REDUCTIONS)
    if num_items is not None and reduction != "mean":
        raise ValueError(f"{op}: num_items is the divisor of reduction='mean'; got reduction={reduction!r}; drop one")
    hidden, head = checked_head(op, hidden, weight, bias, lora, vocab_size)
    _checks.positive(op, softcap=softcap)
    check_aggregation(op, labels, "token-mean", num_items)
    tokens = flat_tokens(
        op,
        hidden,
        labels,
        None,
        temperature=temperature,
        vocab=head.weight.shape[0],
        ignore_index=ignore_index,
        targets_name="labels",
    )
    inputs = Inputs(as_rows(hidden), head, tokens, softcap or 0.0)
    loss = implementation(op, hidden)(inputs, reduction, num_items)
    return unflat(loss, hidden.shape[:-1]) if reduction == "none" else loss


@implements("linear_cross_entropy", "torch")
def _torch(inputs: Inputs, reduction: str, num_items: float | Tensor | None) -> Tensor:
    losses = -linear_logprobs_reference(inputs, False)[0]
    if reduction == "none":
        return losses
    num_items = 1.0 if reduction == "sum" else num_items
    return reduced(losses, inputs.tokens.live, aggregation="token-mean", num_items=num_items)


# ---- on the engines -------------------------------------------------------------------------------------------------
#
# With a mean or a sum, the weight of each token is known before the sweep. So the forward computes all gradients, those
# of a trained head included: two matrix products with a frozen head, three otherwise.


@implements("linear_cross_entropy", "fused")
def _fused(inputs: Inputs, reduction: str, num_items: float | Tensor | None) -> Tensor:
    if reduction == "none":
        return -linear_logprobs_fused(inputs, False)[0]
    divisor = 1.0 if reduction == "sum" else num_items
    targets, live, *_ = inputs.tokens
    weights = token_weights(targets, live, aggregation="token-mean", num_items=divisor)
    return _forward(_Forward(inputs, weights, wanted(inputs.hidden, inputs.head)))[0]


class _Forward(NamedTuple):
    inputs: Inputs
    weights: Tensor  # (N,) the result is sum(weights * losses)
    wants: list[bool]  # in the order of HeadGradients


def _kernel(
    given: _Forward,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> sum(weights * losses), and its gradients in the order of HeadGradients."""
    hidden, head, tokens, softcap = given.inputs
    rows = LiveRows(tokens, softcap)
    slopes = -rows.take(given.weights)
    logprobs = hidden.new_empty(rows.count, dtype=torch.float32)

    def fold(part: slice, logits: tuple[Tensor, ...], grad: Tensor | None) -> None:
        launch(
            records.LinearLogprobs(
                rows=rows.part(part, logits[0]),
                logits=logits_of(logits[0]),
                outputs=RowOutputs(logprobs[part]),
                grad=NOTHING if grad is None else logits_of(grad),
                grad_logprobs=slopes[part],
                grad_entropy=None,
                grad_logsumexp=None,
            ),
            logprobs,
        )

    grads = sweep(head, (rows.take(hidden),), fold, given.wants)
    loss = reduced(slopes * logprobs, None, aggregation="token-mean", num_items=1.0)
    return loss, rows.put(grads.hidden), *grads[1:]


def _fake(given: _Forward) -> tuple[Tensor | None, ...]:
    hidden, head = given.inputs[:2]
    return hidden.new_empty((), dtype=torch.float32), *empty_gradients(hidden, head, given.wants)


def _save(ctx: Any, given: _Forward, output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = wanted_dtypes(*given.inputs[:2], given.wants)
    not_differentiable(ctx, output[1:])
    ctx.save_for_backward(*output[1:])


def _gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(scaled(grad_loss, ctx.saved_tensors, ctx.dtypes))


_trained = tuple(f"inputs.{path}" for path in TRAINED)
_forward = fused_op("linear_cross_entropy", _Forward, _kernel, _fake, trained=_trained, save=_save, gradient=_gradient)
