"""Log-probs of policy and reference, entropy and exact KL in one pass over their shared head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._dispatch import implementation, implements, launch
from ._linear import Head, autocasted, checked_head, in_full_precision, over_live_rows, project, without_adapter
from ._op import fused_op
from ._rows import NOTHING, Tokens, as_rows, expanded, flat_tokens, logits_of, unflat
from ._sweep import TRAINED, HeadGradients, LiveRows, empty_gradients, sweep, wanted_dtypes
from .exact_kl import Inputs as KlInputs
from .exact_kl import reference as exact_kl_reference
from .masked_logprobs import reference_of_rows


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

    The gradient flows to ``hidden`` and, where they are trained, to ``weight`` and ``bias``, only through the policy's
    logits; the reference is a constant.

    Args:
        hidden: (..., H), the policy's; float64, float32, bfloat16 or float16.
        ref_hidden: (..., H), the reference's, same dtype.
        weight: (V, H), dtype of hidden; inside torch.autocast both are cast to its dtype, as F.linear does.
        targets: (...), integer token ids, not shifted by this function: row t is the state that predicts target t.
        mask: (...), bool or 0/1, 1 = counts. Masked tokens are not computed, and their data is never used.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        bias, temperature, softcap, vocab_size, ignore_index: as in ``linear_logprobs``.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or value.
        IndexError: on the CPU, a live target outside the vocabulary; on a GPU its row is NaN.
    """
    op = "linear_policy_ref"
    hidden, head = checked_head(op, hidden, weight, bias, None, vocab_size)
    reference = checked_reference(op, hidden, ref_hidden)
    _checks.positive(op, softcap=softcap)
    tokens = flat_tokens(
        op, hidden, targets, mask, temperature=temperature, vocab=head.weight.shape[0], ignore_index=ignore_index
    )
    inputs = Inputs(as_rows(hidden), reference, head, tokens, softcap or 0.0)
    return PolicyRef(*(unflat(result, hidden.shape[:-1]) for result in implementation(op, hidden)(inputs)))


def checked_reference(op: str, hidden: Tensor, ref_hidden: Tensor) -> Tensor:
    """Checks ref_hidden against hidden (..., H) of ``checked_head``. Returns it as a constant (N, H)."""
    _checks.floating(op, ref_hidden=ref_hidden)
    ref_hidden = autocasted(ref_hidden)
    if ref_hidden.dtype != hidden.dtype:
        raise TypeError(f"{op}: ref_hidden must be {hidden.dtype} like hidden; got {ref_hidden.dtype}")
    _checks.shaped(op, hidden.shape, "that of hidden", ref_hidden=ref_hidden)
    _checks.same_device(op, hidden=hidden, ref_hidden=ref_hidden)
    return as_rows(_checks.constant(ref_hidden))


class Inputs(NamedTuple):
    hidden: Tensor  # (N, H)
    ref_hidden: Tensor
    head: Head  # the reference's too, but for the adapter
    tokens: Tokens
    softcap: float  # 0 = none


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("linear_policy_ref", "torch")
def reference(inputs: Inputs) -> tuple[Tensor, ...]:
    """-> the fields of PolicyRef, each (N,)."""
    head = in_full_precision(inputs.head, inputs.hidden)
    targets = inputs.tokens.targets
    live, temperature = expanded(inputs.hidden, *inputs.tokens[1:4])
    softcap = inputs.softcap or None

    def chunk(hidden: Tensor, ref_hidden: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        logits = project(hidden, head, softcap)
        with torch.no_grad():
            ref_logits = project(ref_hidden, without_adapter(head), softcap)
            ref_logprobs = reference_of_rows(ref_logits, targets, temperature, False).logprobs
        logprobs, entropy, *_ = reference_of_rows(logits, targets, temperature, True)
        assert entropy is not None  # return_entropy is True
        kl = exact_kl_reference(KlInputs(logits, ref_logits, None, temperature, 1.0))
        return logprobs, ref_logprobs, entropy, kl

    return over_live_rows(chunk, live, head, inputs.hidden, inputs.ref_hidden, targets, temperature)


# ---- on the engines: the sweep of _sweep.py, whose kernel reads the logits of policy and reference together ----------


def _kernel(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the fields of PolicyRef, each (N,)."""
    rows = LiveRows(inputs.tokens, inputs.softcap)
    results = PolicyRef(*[inputs.hidden.new_empty(rows.count, dtype=torch.float32) for _ in PolicyRef._fields])
    _fold_all(rows, inputs, results, (None, None, None), [False] * len(TRAINED))
    logprobs, ref_logprobs, entropy, kl = map(rows.put, results)
    return logprobs, ref_logprobs, entropy, kl


def _fold_all(
    rows: LiveRows, inputs: Inputs, results: PolicyRef, slopes: tuple[Tensor | None, ...], wants: list[bool]
) -> HeadGradients:
    """``slopes``: d loss / d logprobs, entropy and KL, each (live,) or None."""

    def fold(part: slice, logits: tuple[Tensor, ...], grad: Tensor | None) -> None:
        grad_logprobs, grad_entropy, grad_kl = (None if slope is None else slope[part] for slope in slopes)
        launch(
            records.LinearPolicyRef(
                rows=rows.part(part, logits[0]),
                logits=logits_of(logits[0]),
                ref_logits=logits_of(logits[1]),
                logprobs=results.logprobs[part],
                ref_logprobs=results.ref_logprobs[part],
                entropy=results.entropy[part],
                kl=results.exact_kl[part],
                grad=NOTHING if grad is None else logits_of(grad),
                grad_logprobs=grad_logprobs,
                grad_entropy=grad_entropy,
                grad_kl=grad_kl,
            ),
            results.logprobs,
        )

    hiddens = (rows.take(inputs.hidden), rows.take(inputs.ref_hidden))
    return sweep(inputs.head, hiddens, fold, wants)


def _fake(inputs: Inputs) -> tuple[Tensor, ...]:
    rows = inputs.hidden.shape[0]
    return tuple(inputs.hidden.new_empty(rows, dtype=torch.float32) for _ in PolicyRef._fields)


class _Backward(NamedTuple):
    inputs: Inputs
    grad_logprobs: Tensor
    grad_entropy: Tensor
    grad_kl: Tensor
    wants: list[bool]


def _backward_kernel(given: _Backward) -> HeadGradients:
    """Recomputes the logits."""
    inputs, *slopes, wants = given
    rows = LiveRows(inputs.tokens, inputs.softcap)
    unused = PolicyRef(*inputs.hidden.new_empty(4, rows.count, dtype=torch.float32).unbind())
    grads = _fold_all(rows, inputs, unused, tuple(map(rows.take, slopes)), wants)
    return grads._replace(hidden=rows.put(grads.hidden))


def _backward_fake(given: _Backward) -> HeadGradients:
    return empty_gradients(given.inputs.hidden, given.inputs.head, given.wants)


def _save(ctx: Any, inputs: Inputs, output: tuple[Tensor, ...]) -> None:
    hidden, ref_hidden, head, (*of_tokens, ctx.temperature, _), ctx.softcap = inputs
    ctx.scale = head.scale
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, ref_hidden, *head[:4], *of_tokens)


def _gradient(
    ctx: Any, grad_logprobs: Tensor, grad_ref: Tensor, grad_entropy: Tensor, grad_kl: Tensor
) -> tuple[Tensor | None, ...]:
    hidden, ref_hidden, weight, bias, down, up, targets, live, temperatures = ctx.saved_tensors
    head, tokens = Head(weight, bias, down, up, ctx.scale), Tokens(targets, live, temperatures, ctx.temperature)
    inputs, wants = Inputs(hidden, ref_hidden, head, tokens, ctx.softcap), list(ctx.needs)
    grads = _backward(_Backward(inputs, grad_logprobs, grad_entropy, grad_kl, wants))
    dtypes = wanted_dtypes(hidden, head, wants)
    return tuple(None if dtype is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


_backward = fused_op("linear_policy_ref_backward", _Backward, _backward_kernel, _backward_fake)
fused = fused_op("linear_policy_ref", Inputs, _kernel, _fake, trained=TRAINED, save=_save, gradient=_gradient)
implements("linear_policy_ref", "fused")(fused)
