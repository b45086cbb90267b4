"""Policy and reference in one pass over a head that they share."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._dispatch import implementation, implements
from ._linear import Head, autocasted, checked_head, flat_hidden, in_full_precision, over_live_rows, project
from ._tokens import flat_tokens
from ._vocab import accumulation_dtype
from .exact_kl import reference as exact_kl_reference
from .masked_logprobs import reference as masked_logprobs_reference


class PolicyRef(NamedTuple):
    """All (...), float32 (float64 for float64 hidden), 0 where masked."""

    logprobs: Tensor
    ref_logprobs: Tensor  # without gradient
    entropy: Tensor  # of the policy, nats
    exact_kl: Tensor  # KL(policy || reference) over the whole vocabulary, nats


def linear_policy_ref(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> PolicyRef:
    """Log-probabilities of policy and reference, the policy's entropy and the exact KL, from two sets of hidden states.

    The gradient flows to ``hidden``, and to ``weight`` and ``bias`` where they are trained, through the policy alone;
    the reference is a constant.

    Args:
        hidden: (..., H), the policy's; float64, float32, bfloat16 or float16.
        ref_hidden: (..., H), the reference's, same dtype.
        weight: (V, H), dtype of hidden; inside torch.autocast both are cast to its dtype, as F.linear does.
        targets: (...), integer token ids. Nothing is shifted here: row t is the state that predicts target t.
        mask: (...), bool or 0/1, 1 = counts. Masked tokens are not computed, and their data is never used.
            A value other than 0 and 1 is an error on the CPU; on a GPU, where asking would wait, it counts as 1.
        bias, temperature, softcap, vocab_size, ignore_index: as in ``linear_logprobs``.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or value.
        IndexError: on the CPU, a live target outside the vocabulary; on a GPU its row is NaN.
    """
    op = "linear_policy_ref"
    hidden, head = checked_head(op, hidden, weight, bias, None, vocab_size)
    _checks.floating(op, ref_hidden=ref_hidden)
    ref_hidden = autocasted(ref_hidden)
    if ref_hidden.dtype != hidden.dtype:
        raise TypeError(f"{op}: ref_hidden must be {hidden.dtype} like hidden; got {ref_hidden.dtype}")
    _checks.shaped(op, hidden.shape, "that of hidden", ref_hidden=ref_hidden)
    _checks.same_device(op, hidden=hidden, ref_hidden=ref_hidden)
    _checks.positive(op, softcap=softcap)
    tokens = flat_tokens(
        op, hidden, targets, mask, temperature=temperature, vocab=head.weight.shape[0], ignore_index=ignore_index
    )
    run = implementation(op, hidden)
    results = run(
        flat_hidden(hidden), flat_hidden(_checks.constant(ref_hidden)), head.weight, head.bias, *tokens, softcap
    )
    return PolicyRef(*(result.reshape(hidden.shape[:-1]) for result in results))


@implements("linear_policy_ref", "torch")
def reference(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    live: Tensor,
    temperature: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, ref_hidden (N, H), weight (V, H), the rest (N,) -> the fields of PolicyRef, each (N,)."""
    head = in_full_precision(Head(weight, bias, None), accumulation_dtype(hidden.dtype))
    vocab = weight.shape[0]

    def chunk(hidden: Tensor, ref_hidden: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        alive = torch.ones_like(targets, dtype=torch.bool)
        logits = project(hidden, head, softcap)
        with torch.no_grad():
            ref_logits = project(ref_hidden, head, softcap)
            ref_logprobs, _ = masked_logprobs_reference(
                ref_logits, targets, alive, temperature, None, vocab, False, False
            )
        logprobs, entropy = masked_logprobs_reference(logits, targets, alive, temperature, None, vocab, True, False)
        assert entropy is not None  # it was asked for
        return logprobs, ref_logprobs, entropy, exact_kl_reference(logits, ref_logits, alive, temperature)

    logprobs, ref_logprobs, entropy, kl = over_live_rows(chunk, live, head, hidden, ref_hidden, targets, temperature)
    return logprobs, ref_logprobs, entropy, kl
