"""PPO's policy loss, with KL and entropy terms, from hidden states, without ever storing all logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._aggregate import check_aggregation, reduced, scalar_tensor, token_weights
from ._dispatch import implementation, implements, launch
from ._linear import Inputs, LoRA, checked_head
from ._losses import (
    ESTIMATORS,
    JOINT_STATISTICS,
    KL,
    LossInputs,
    check_ratio_level,
    check_reference,
    policy_terms,
    with_measures,
)
from ._op import fused_op, not_differentiable
from ._rows import NOTHING, accumulation_dtype, as_rows, flat, flat_tokens, logits_of, unflat
from ._sweep import TRAINED, LiveRows, empty_gradients, scaled, sweep, wanted, wanted_dtypes
from .clipped_policy_loss import policy_loss
from .linear_logprobs import fused as linear_logprobs_fused
from .linear_logprobs import reference as linear_logprobs_reference
from .linear_policy_ref import Inputs as PairInputs
from .linear_policy_ref import checked_reference
from .linear_policy_ref import fused as linear_policy_ref_fused
from .linear_policy_ref import reference as linear_policy_ref_reference
from .ppo_loss import with_terms

EXACT = "exact"  # the KL over the whole vocabulary, not an estimate from the log-probs of the tokens


class LinearPolicyLoss(NamedTuple):
    """0-dim tensors on the device of the inputs; all but ``loss`` without gradient."""

    loss: Tensor  # policy_loss + kl_coef * kl - entropy_coef * entropy
    policy_loss: Tensor
    kl: Tensor  # aggregated like the loss; 0 without a reference
    entropy: Tensor  # aggregated like the loss, nats
    clip_fraction: Tensor  # this and the rest as in PolicyLoss
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    ratio_var: Tensor


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    aggregation: str = "token-mean",
    num_items: float | Tensor | None = None,
) -> LinearPolicyLoss:
    """Clipped policy loss + kl_coef * KL - entropy_coef * entropy, each with the same aggregation. Never stores all
    logits.

    Args:
        hidden: (..., H), or (B, T, H) if ``aggregation`` or ``ratio_level`` depends on sequences.
        weight: (V, H), dtype of hidden; inside torch.autocast both are cast to its dtype, as F.linear does. A frozen
            weight needs no gradient product.
        targets: (...), integer token ids, not shifted by this function: row t is the state that predicts target t.
        old_logprobs: (...), log-probs of the policy that sampled; a constant. None: it is this policy, whose log-probs
            are computed here once.
        advantages: (...), positive for tokens that were better than expected; a constant.
        mask: (...), bool or 0/1, 1 = counts. Masked tokens are not computed, and their data is never used.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        ref_logprobs: (...), log-probs of the reference, for the KL term; a constant. Without it or ref_hidden there is
            no KL term.
        ref_hidden: (..., H), dtype of hidden, with kl_estimator "exact": the reference's hidden states under the same
            head without ``lora``; a constant.
        kl_coef: weight of the KL term, >= 0.
        kl_estimator: see ``token_kl`` for the estimators from ref_logprobs and their gradients. "exact" is
            KL(policy || reference) over the whole vocabulary with its exact gradient, as in ``linear_policy_ref``.
        entropy_coef: weight of the entropy bonus, >= 0.
        bias, lora, temperature, softcap, vocab_size, ignore_index: as in ``linear_logprobs``.
        clip_low, clip_high, dual_clip, ratio_level, aggregation, num_items: as in ``clipped_policy_loss``.

    Returns:
        ``LinearPolicyLoss``, float32 (float64 for float64 hidden), all 0 when nothing is live.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or value.
        IndexError: on the CPU, a live target outside the vocabulary; on a GPU its row is NaN.
    """
    op = "linear_policy_loss"
    hidden, head = checked_head(op, hidden, weight, bias, lora, vocab_size)
    _checks.positive(op, softcap=softcap)
    _checks.one_of(op, "kl_estimator", kl_estimator, (*ESTIMATORS, EXACT))
    exact = kl_estimator == EXACT
    terms = policy_terms(
        op, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_coef=kl_coef,
        kl_estimator="k1" if exact else kl_estimator, entropy_coef=entropy_coef,
    )  # fmt: skip
    if exact != (ref_hidden is not None) or (exact and ref_logprobs is not None):
        given = [name for name, ref in (("ref_hidden", ref_hidden), ("ref_logprobs", ref_logprobs)) if ref is not None]
        raise ValueError(
            f"{op}: kl_estimator 'exact' needs ref_hidden and no ref_logprobs, and no other takes ref_hidden; "
            f"got {kl_estimator!r} with {' and '.join(given) or 'no reference'}"
        )
    if not exact:
        check_reference(op, ref_logprobs, kl_coef)
    reference = None if ref_hidden is None else checked_reference(op, hidden, ref_hidden)
    shape = hidden.shape[:-1]
    numbers = {"advantages": advantages}
    if old_logprobs is not None:
        numbers["old_logprobs"] = old_logprobs
    if ref_logprobs is not None:
        numbers["ref_logprobs"] = ref_logprobs
    _checks.floating(op, **numbers)
    _checks.shaped(op, shape, "the leading shape of hidden", **numbers)
    _checks.same_device(op, hidden=hidden, **numbers)
    check_ratio_level(op, advantages, ratio_level)
    check_aggregation(op, advantages, aggregation, num_items)
    dtype = accumulation_dtype(hidden.dtype)
    tokens = flat_tokens(
        op, hidden, targets, mask, temperature=temperature, vocab=head.weight.shape[0], ignore_index=ignore_index
    )
    constants: Any = {name: _checks.constant(tensor).to(dtype) for name, tensor in numbers.items()}
    loss = LossInputs(
        **constants,
        live=None if tokens.live is None else unflat(tokens.live, shape),
        terms=terms,
        sequence_level=ratio_level == "sequence",
        aggregation=aggregation,
        num_items=scalar_tensor(num_items),
    )
    inputs = Inputs(as_rows(hidden), head, tokens, softcap or 0.0)
    total, statistics = implementation(op, hidden)(inputs, loss, reference)
    return LinearPolicyLoss(total, *statistics)


def _from_logprobs(
    loss: LossInputs, logprobs: Tensor, entropy: Tensor | None, exact_kl: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-> the loss and the other fields of LinearPolicyLoss, of logprobs, entropy and exact KL (N,)."""
    assert entropy is not None  # return_entropy was True
    shape = loss.advantages.shape
    loss = loss._replace(logprobs=unflat(logprobs, shape), entropy=unflat(entropy, shape))
    if loss.old_logprobs is None:
        loss = loss._replace(old_logprobs=loss.logprobs.detach())
    policy, *statistics = policy_loss(loss._replace(entropy=None, ref_logprobs=None))
    return with_terms(loss, policy, tuple(statistics), None if exact_kl is None else unflat(exact_kl, shape))


def _pair(inputs: Inputs, ref_hidden: Tensor) -> PairInputs:
    return PairInputs(inputs.hidden, ref_hidden, inputs.head, inputs.tokens, inputs.softcap)


@implements("linear_policy_loss", "torch")
def _torch(inputs: Inputs, loss: LossInputs, ref_hidden: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    if ref_hidden is None:
        return _from_logprobs(loss, *linear_logprobs_reference(inputs, True)[:2])
    logprobs, _, entropy, kl = linear_policy_ref_reference(_pair(inputs, ref_hidden))
    return _from_logprobs(loss, logprobs, entropy, kl)


# ---- on the engines -------------------------------------------------------------------------------------------------
#
# One sweep (_sweep.py) from hidden states to loss and gradient. With token-level ratios, d loss / d logprob of a token
# depends only on its own log-prob, so its gradient is computed while its logits are still in the buffer.


@implements("linear_policy_loss", "fused")
def _fused(inputs: Inputs, loss: LossInputs, ref_hidden: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    if loss.sequence_level:  # d loss / d logprob depends on all log-probs of the sequence
        if ref_hidden is None:
            ahead = loss.terms.entropy_coef == 0
            return _from_logprobs(loss, *linear_logprobs_fused(inputs, True, ahead=ahead)[:2])
        logprobs, _, entropy, kl = linear_policy_ref_fused(_pair(inputs, ref_hidden))
        return _from_logprobs(loss, logprobs, entropy, kl)
    wants = wanted(inputs.hidden, inputs.head)
    own = _Loss(*[getattr(loss, name) for name in _Loss._fields])
    total, statistics, *_ = _forward(_Forward(inputs, ref_hidden, own, wants))
    policy, _, *others, _ = statistics.unbind()  # without the statistics of the value loss
    return total, (policy, *others)


class _Loss(NamedTuple):
    """The inputs of the loss besides log-probs and entropy; tensors are (B, T). Without old_logprobs, they are the
    policy's own."""

    aggregation: str
    num_items: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    terms: records.PolicyTerms


class _Forward(NamedTuple):
    inputs: Inputs
    ref_hidden: Tensor | None
    loss: _Loss
    wants: list[bool]  # in the order of HeadGradients


def _kernel(
    given: _Forward,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> the loss (), the statistics of ppo_loss, and the loss's gradients as in HeadGradients."""
    (hidden, head, tokens, softcap), ref_hidden, loss, wants = given
    rows = LiveRows(tokens, softcap)
    shape = loss.advantages.shape
    live = None if tokens.live is None else unflat(tokens.live, shape)
    weights = token_weights(loss.advantages, live, aggregation=loss.aggregation, num_items=loss.num_items)

    def of_rows(tensor: Tensor) -> Tensor:
        return rows.take(flat(tensor))

    advantages, share = of_rows(loss.advantages), of_rows(weights)
    # the kernel reads the reference only for a KL term
    ref_logprobs = None
    if loss.ref_logprobs is not None and loss.terms.kl_coef > 0:
        ref_logprobs = of_rows(loss.ref_logprobs)
    logprobs, entropy = torch.empty_like(advantages), torch.empty_like(advantages)
    old_logprobs = logprobs if loss.old_logprobs is None else of_rows(loss.old_logprobs)
    hiddens, exact_kl = [rows.take(hidden)], None
    if ref_hidden is not None:
        hiddens.append(rows.take(ref_hidden))
        exact_kl = torch.empty_like(advantages)

    def fold(part: slice, logits: tuple[Tensor, ...], grad: Tensor | None) -> None:
        record = records.LinearPolicyLoss(
            rows=rows.part(part, logits[0]),
            logits=logits_of(logits[0]),
            ref_logits=NOTHING if exact_kl is None else logits_of(logits[1]),
            old_logprobs=old_logprobs[part],
            advantages=advantages[part],
            ref_logprobs=None if ref_logprobs is None else ref_logprobs[part],
            share=share[part],
            terms=loss.terms,
            grad=NOTHING,
            logprobs=logprobs[part],
            entropy=entropy[part],
            kl=None if exact_kl is None else exact_kl[part],
        )
        if loss.old_logprobs is None or grad is None:
            launch(record, logprobs)  # without a gradient the kernel does not read old_logprobs
        if grad is not None:
            old = logprobs[part].clone() if loss.old_logprobs is None else old_logprobs[part]
            launch(record._replace(old_logprobs=old, grad=logits_of(grad)), logprobs)

    grads = sweep(head, tuple(hiddens), fold, wants)
    logprobs, entropy = (unflat(rows.put(result), shape) for result in (logprobs, entropy))
    measured = LossInputs(**loss._asdict(), live=live, logprobs=logprobs, entropy=entropy)
    if loss.old_logprobs is None:
        measured = measured._replace(old_logprobs=logprobs)
    if exact_kl is None:
        total, statistics = with_measures(measured)
    else:
        total, statistics = with_measures(measured._replace(terms=loss.terms._replace(kl_coef=0.0)))
        kl = unflat(rows.put(exact_kl), shape)
        kl = reduced(kl, live, aggregation=loss.aggregation, num_items=loss.num_items)
        statistics[KL] = kl
        if loss.terms.kl_coef > 0:
            total = total + loss.terms.kl_coef * kl
    return total, statistics, rows.put(grads.hidden), *grads[1:]


def _fake(given: _Forward) -> tuple[Tensor | None, ...]:
    hidden, head = given.inputs[:2]
    statistics = hidden.new_empty(JOINT_STATISTICS, dtype=torch.float32)
    return statistics.new_empty(()), statistics, *empty_gradients(hidden, head, given.wants)


def _save(ctx: Any, given: _Forward, output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = wanted_dtypes(*given.inputs[:2], given.wants)
    not_differentiable(ctx, output[1:])
    ctx.save_for_backward(*output[2:])


def _gradient(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(scaled(grad_total, ctx.saved_tensors, ctx.dtypes))


_trained = tuple(f"inputs.{path}" for path in TRAINED)
_forward = fused_op("linear_policy_loss", _Forward, _kernel, _fake, trained=_trained, save=_save, gradient=_gradient)
