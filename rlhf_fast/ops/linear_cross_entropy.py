"""Cross-entropy of labels from hidden states, the loss of supervised fine-tuning, without ever storing all logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records
from rlhf_fast.kernels.records import RowOutputs

from . import _checks
from ._aggregate import check_aggregation, reduced, token_weights
from ._dispatch import implementation, implements, launch
from ._linear import Inputs, LoRA, Product, checked_head
from ._op import fused_op, not_differentiable
from ._rows import NOTHING, accumulation_dtype, as_rows, flat, flat_tokens, logits_of, unflat
from ._sweep import TRAINED, LiveRows, empty_gradients, scaled, sweep, wanted, wanted_dtypes
from .linear_logprobs import fused as linear_logprobs_fused
from .linear_logprobs import reference as linear_logprobs_reference

REDUCTIONS = ("mean", "sum", "none")
_ROWS_AT_ONCE = 4096  # of a head that is summed in full precision


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
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
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
        weights: (...), float; factors of the labels' losses; a constant. They do not change the divisor: for a weighted
            mean, give their sum over the labels that count as num_items.
        label_smoothing: e in [0, 1): the label has probability 1 - e, and e is spread over the whole vocabulary, as in
            F.cross_entropy and Transformers. It needs no logits, and so no softcap: a label's logit and the mean logit
            are linear in the hidden state. A logit of -inf gives inf. Its part of a trained head's gradient is summed
            in the dtype of the head.

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
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1); got {label_smoothing!r}")
    if label_smoothing > 0 and softcap is not None:
        raise ValueError(
            f"{op}: label_smoothing needs softcap=None, since the mean of capped logits needs all of them; "
            f"got {softcap!r}"
        )
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
    factors = None if weights is None else _factors(op, weights, inputs, hidden.shape[:-1])
    how = _Reduction(reduction, 1.0 if reduction == "sum" else num_items, factors)
    loss = implementation(op, hidden)(inputs, how)
    if label_smoothing > 0:  # (1 - e) (lse - x) + e (lse - mean) = (lse - x) + e (x - mean), with the label's logit x
        loss = loss + label_smoothing * _reduced(_above_mean(inputs), inputs.tokens.live, how)
    return unflat(loss, hidden.shape[:-1]) if reduction == "none" else loss


class _Reduction(NamedTuple):
    reduction: str
    num_items: float | Tensor | None  # the divisor; None = the labels that count
    factors: Tensor | None  # (N,) of the losses, 0 where masked


def _factors(op: str, weights: Tensor, inputs: Inputs, shape: torch.Size) -> Tensor:
    _checks.floating(op, weights=weights)
    _checks.shaped(op, shape, "one a label", weights=weights)
    _checks.same_device(op, hidden=inputs.hidden, weights=weights)
    factors = flat(_checks.constant(weights)).to(accumulation_dtype(inputs.hidden.dtype))
    return factors if inputs.tokens.live is None else torch.where(inputs.tokens.live, factors, 0.0)


def _reduced(losses: Tensor, live: Tensor | None, how: _Reduction) -> Tensor:
    """(N,) -> (N,) for "none", else ()."""
    if how.factors is not None:
        losses = losses * how.factors
    if how.reduction == "none":
        return losses
    return reduced(losses, live, aggregation="token-mean", num_items=how.num_items)


def _above_mean(inputs: Inputs) -> Tensor:
    """(N,): the label's logit less the mean logit of its row, from differences of the head's rows; 0 where masked."""
    hidden, head, tokens, _ = inputs
    dtype = accumulation_dtype(hidden.dtype)
    live = torch.ones_like(tokens.targets, dtype=torch.bool) if tokens.live is None else tokens.live
    columns = head.weight.shape[0]
    labels = tokens.targets.clamp(0, columns - 1)  # the loss of a label outside is NaN already

    def from_mean(part: Tensor) -> Tensor:
        """(V, ...) -> (N, ...): the labels' rows less the mean row."""
        total = torch.stack([rows.sum(0, dtype=dtype) for rows in part.split(_ROWS_AT_ONCE)]).sum(0)
        return part.index_select(0, labels).to(dtype) - total / columns

    states = torch.where(live[:, None], hidden, 0.0).to(dtype)
    above = (states * from_mean(head.weight)).sum(-1)
    if head.down is not None and head.up is not None:
        above = above + head.scale * (Product.apply(states, head.down.to(dtype)) * from_mean(head.up)).sum(-1)
    if head.bias is not None:
        above = above + from_mean(head.bias)
    temperatures: Tensor | float = tokens.temperature
    if tokens.temperatures is not None:
        temperatures = torch.where(live, tokens.temperatures, 1.0)
    return torch.where(live, above / temperatures, 0.0)


@implements("linear_cross_entropy", "torch")
def _torch(inputs: Inputs, how: _Reduction) -> Tensor:
    return _reduced(-linear_logprobs_reference(inputs, False)[0], inputs.tokens.live, how)


# ---- on the engines -------------------------------------------------------------------------------------------------
#
# With a mean or a sum, the weight of each token is known before the sweep. So the forward computes all gradients, those
# of a trained head included: two matrix products with a frozen head, three otherwise.


@implements("linear_cross_entropy", "fused")
def _fused(inputs: Inputs, how: _Reduction) -> Tensor:
    if how.reduction == "none":
        return _reduced(-linear_logprobs_fused(inputs, False)[0], inputs.tokens.live, how)
    targets, live, *_ = inputs.tokens
    weights = token_weights(targets, live, aggregation="token-mean", num_items=how.num_items)
    if how.factors is not None:
        weights = weights * how.factors
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
