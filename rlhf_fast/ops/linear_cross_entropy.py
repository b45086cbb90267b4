"""Cross-entropy of labels straight from hidden states: the loss of supervised fine-tuning."""

from torch import Tensor

from . import _checks
from ._aggregate import aggregate, check_aggregation
from ._dispatch import implementation, implements
from ._linear import LoRA, checked_head, flat_hidden
from ._tokens import flat_tokens
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
    """-log softmax(hidden weight^T + bias)[label], reduced. The logits never exist whole.

    Nothing is shifted here: row t of hidden is the state that predicts labels[t], so a causal model's caller passes
    ``hidden[:, :-1]`` and ``labels[:, 1:]``.

    Args:
        hidden: (..., H), float64, float32, bfloat16 or float16.
        weight: (V, H), dtype of hidden; inside torch.autocast both are cast to its dtype, as F.linear does.
        labels: (...), integer token ids; ``ignore_index`` = does not count, and its row is not computed.
        bias, lora, temperature, softcap, vocab_size: as in ``linear_logprobs``.
        reduction: "mean" over the labels that count, "sum", or "none" for (...).
        num_items: the divisor of "mean" in place of the count of this call's labels: the count over the whole batch,
            where it is split over accumulation steps or ranks. A number or a 0-dim tensor.

    Returns:
        0-dim (or (...) for "none"), float32 (float64 for float64 hidden). With no label that counts: 0, with zero
        gradients.

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
    loss = implementation(op, hidden)(flat_hidden(hidden), *head, *tokens, softcap, reduction, num_items)
    return loss.reshape(hidden.shape[:-1]) if reduction == "none" else loss


@implements("linear_cross_entropy", "torch")
def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float | None,
    reduction: str,
    num_items: float | Tensor | None,
) -> Tensor:
    """hidden (N, H), weight (V, H), the rest (N,) -> the loss, or losses (N,) for "none"."""
    losses = -linear_logprobs_reference(hidden, weight, bias, lora, targets, live, temperature, softcap, False)[0]
    if reduction == "none":
        return losses
    return aggregate(losses, live, aggregation="token-mean", num_items=1.0 if reduction == "sum" else num_items)
