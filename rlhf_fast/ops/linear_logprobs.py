"""Log-probabilities of the target tokens straight from hidden states: the logits never exist whole."""

from typing import Literal, overload

import torch
from torch import Tensor

from . import _checks
from ._dispatch import implementation, implements
from ._linear import Head, LoRA, checked_head, flat_hidden, in_full_precision, over_live_rows, project
from ._tokens import flat_tokens
from ._vocab import accumulation_dtype
from .masked_logprobs import reference as masked_logprobs_reference


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
) -> tuple[Tensor, Tensor]: ...
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
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T + bias)[target] for every live token, 0 for the others.

    Masked tokens are not computed at all. Logits are formed in full precision (float32, float64 for float64), capped,
    then divided by the temperature. A frozen weight costs no gradient product of its own; the gradient of a trained
    one adds up in full precision and is rounded once.

    Args:
        hidden: (..., H), float64, float32, bfloat16 or float16.
        weight: (V, H), dtype of hidden; inside torch.autocast both are cast to its dtype, as F.linear does.
        targets: (...), integer token ids. Nothing is shifted here: row t is the state that predicts target t.
        mask: (...), bool or 0/1, 1 = counts. The data of a masked row is never used, NaN or inf included.
            A value other than 0 and 1 is an error on the CPU; on a GPU, where asking would wait, it counts as 1.
        bias: (V,).
        lora: an adapter on the head, (A (r, H), B (V, r), scale): logits gain scale * (hidden A^T) B^T.
        temperature: a number > 0, or a tensor () or (...) with one a row. It receives no gradient.
        softcap: the cap of the model's own logit soft-capping, > 0.
        vocab_size: leaves the rows of weight from this one on (padding) out of the softmax, with zero gradient.
        ignore_index: a target with this value is masked.
        return_entropy: also return the entropy of each live row in nats, which has a gradient too.

    Returns:
        logprobs (...) or (logprobs, entropy), float32 (float64 for float64 hidden), 0 where masked. NaN or inf in a
        live row of hidden gives NaN in that row alone.

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
    run = implementation(op, hidden)
    logprobs, entropy = run(flat_hidden(hidden), *head, *tokens, softcap, return_entropy)
    shape = hidden.shape[:-1]
    return (logprobs.reshape(shape), entropy.reshape(shape)) if return_entropy else logprobs.reshape(shape)


@implements("linear_logprobs", "torch")
def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float | None,
    return_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """hidden (N, H), weight (V, H), the rest (N,) -> logprobs (N,), entropy (N,) or None."""
    head = in_full_precision(Head(weight, bias, lora), accumulation_dtype(hidden.dtype))
    vocab = weight.shape[0]

    def chunk(hidden: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        logits = project(hidden, head, softcap)
        alive = torch.ones_like(targets, dtype=torch.bool)
        results = masked_logprobs_reference(logits, targets, alive, temperature, None, vocab, return_entropy, False)
        return tuple(result for result in results if result is not None)

    results = over_live_rows(chunk, live, head, hidden, targets, temperature)
    return results[0], results[1] if return_entropy else None
