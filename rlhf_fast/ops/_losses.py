"""Shared by clipped_policy_loss, clipped_value_loss and ppo_loss: checks of scalars, and the fused implementation.

All three use the same launcher, which computes loss, gradients and statistics in one pass. The backward multiplies the
gradients by that of the loss, which is mostly 1.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._dispatch import implements, launch
from ._op import empty_contiguous, fused_op, graph_is_kept

ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
JOINT_STATISTICS = 10  # the number of ppo_loss's statistics: 4 terms, 5 of the policy, 1 of the value
KL = 2  # the place of the KL term among them
ABSENT = cast(Tensor, None)


def _codes(estimator: str) -> tuple[int, int]:
    """Codes of the formulas of an estimator's value and of its slope; a "+" form has the slope of k2."""
    value = records.KL_ESTIMATORS.index(estimator.removesuffix("+"))
    return value, records.KL_ESTIMATORS.index("k2") if estimator.endswith("+") else value


KL_CODES = {estimator: _codes(estimator) for estimator in ESTIMATORS}


class LossInputs(NamedTuple):
    """The inputs of the three losses. Tensors are (B, T), or of any shape if no option depends on sequences, and of one
    dtype. The value loss leaves the policy's tensors ABSENT, and the policy loss those of the value.
    """

    aggregation: str
    num_items: Tensor | None
    live: Tensor | None
    terms: records.PolicyTerms = records.PolicyTerms()
    value_terms: records.ValueTerms = records.ValueTerms()
    sequence_level: bool = False
    logprobs: records.Given = ABSENT
    old_logprobs: records.Given = ABSENT
    advantages: records.Given = ABSENT
    entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: records.Given = ABSENT
    old_values: records.Given = ABSENT
    returns: records.Given = ABSENT


_OF_POLICY, _OF_VALUE = records.ranges_of(records.PolicyTerms), records.ranges_of(records.ValueTerms)


def policy_terms(op: str, *, kl_estimator: str = "k1", **scalars: float | None) -> records.PolicyTerms:
    """Checks the scalars of a policy loss and returns them as a record. The defaults leave a term out of the loss."""
    numbers = _checks.in_ranges(op, _OF_POLICY, scalars)
    _checks.one_of(op, "kl_estimator", kl_estimator, ESTIMATORS)
    kl, kl_slope = KL_CODES[kl_estimator]
    return records.PolicyTerms(**numbers, kl=kl, kl_slope=kl_slope)


def value_terms(op: str, prefix: str = "", **scalars: float | None) -> records.ValueTerms:
    """Checks the scalars of a value loss and returns them as a record. Errors put ``prefix`` before a field's name."""
    return records.ValueTerms(**_checks.in_ranges(op, _OF_VALUE, scalars, prefix))


def check_ratio_level(op: str, logprobs: Tensor, ratio_level: str) -> None:
    _checks.one_of(op, "ratio_level", ratio_level, ("token", "sequence"))
    if ratio_level == "sequence" and logprobs.dim() != 2:
        raise ValueError(
            f"{op}: ratio_level 'sequence' needs (B, T), one row a sequence; got shape {tuple(logprobs.shape)}"
        )


def check_reference(op: str, ref_logprobs: Tensor | None, kl_coef: float) -> None:
    """Raises ValueError for a KL term without log-probs of the reference."""
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"{op}: kl_coef={kl_coef!r} needs ref_logprobs, which is None; pass them or set kl_coef=0")


# ---- on the engines --------------------------------------------------------------------------------------------------


class _Forward(NamedTuple):
    inputs: LossInputs
    wants: list[bool]  # whether logprobs, values and entropy get a gradient


def _fused(name: str) -> Any:
    """Registers the fused op of this name. It returns the loss and its statistics."""
    forward = fused_op(name, _Forward, _kernel, _outputs, trained=_TRAINED, constants=2, save=_save, gradient=_gradient)

    def run(inputs: LossInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        wants = [False, False, False]
        if torch.is_grad_enabled():
            trained = (inputs.logprobs, inputs.values, inputs.entropy)
            wants = [data is not None and data.requires_grad for data in trained]
        loss, statistics, _ = forward(_Forward(inputs, wants))
        return loss, statistics.unbind()

    return implements(name, "fused")(run)


def _kernel(given: _Forward) -> tuple[Tensor, Tensor, Tensor]:
    """-> the loss (), its statistics (n,), and the wanted gradients: (count, B, T), or (B, T) for one."""
    inputs, wants = given
    loss, statistics, grads = outputs = _outputs(given)
    slots = iter(grads.unbind() if wants.count(True) > 1 else (grads,))
    grad_logprobs, grad_values, grad_entropy = [next(slots) if want else None for want in wants]
    data = inputs.values if inputs.logprobs is None else inputs.logprobs
    shape = data.shape
    sequences, length = shape if len(shape) == 2 else (1, data.numel())
    launch(
        records.PpoLoss(
            policy=inputs.logprobs is not None,
            value=inputs.values is not None,
            sequences=sequences,
            length=length,
            logprobs=_contiguous(inputs.logprobs),
            old_logprobs=_contiguous(inputs.old_logprobs),
            advantages=_contiguous(inputs.advantages),
            values=_contiguous(inputs.values),
            old_values=_contiguous(inputs.old_values),
            returns=_contiguous(inputs.returns),
            entropy=_contiguous(inputs.entropy),
            ref_logprobs=_contiguous(inputs.ref_logprobs),
            live=_contiguous(inputs.live),
            sequence_level=inputs.sequence_level,
            terms=inputs.terms,
            value_terms=inputs.value_terms,
            divisor=_divisor(inputs.aggregation, inputs.num_items),
            loss=loss,
            statistics=statistics,
            grad_logprobs=grad_logprobs,
            grad_values=grad_values,
            grad_entropy=grad_entropy,
        ),
        loss,
    )
    return outputs


def with_measures(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """-> the policy loss with its KL and entropy terms (), and the statistics of ppo_loss."""
    idle = inputs.old_logprobs  # a tensor of this shape in place of values; with a coef of 0 it has no effect
    weightless = records.ValueTerms(coef=0.0)
    loss, statistics, _ = _kernel(
        _Forward(inputs._replace(values=idle, old_values=idle, returns=idle, value_terms=weightless), [False] * 3)
    )
    return loss, statistics


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _divisor(aggregation: str, num_items: Tensor | None) -> records.LossDivisor:
    """The divisor's record. number < 0: the kernel counts tokens or sequences; a tensor on a GPU is passed as it is."""
    number, items = -1.0, None
    if num_items is not None and num_items.is_cuda:
        items = num_items.double()
    elif num_items is not None:
        number = max(float(num_items), 0.0)
    return records.LossDivisor(records.AGGREGATIONS.index(aggregation), number, items)


def _outputs(given: _Forward) -> tuple[Tensor, Tensor, Tensor]:
    policy, value = given.inputs.logprobs, given.inputs.values
    data = value if policy is None else policy
    count = 5 if value is None else 1 if policy is None else JOINT_STATISTICS  # as in records.PpoLoss
    wanted = given.wants.count(True)
    grads = empty_contiguous(data) if wanted == 1 else data.new_empty((wanted, *data.shape))
    return data.new_empty(()), data.new_empty(count), grads


def _save(ctx: Any, given: _Forward, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.wants = given.wants
    ctx.save_for_backward(output[2])


def _gradient(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * len(_TRAINED)
    (grads,) = ctx.saved_tensors
    if _checks.is_eager(grad_loss) and not graph_is_kept():
        grads = grads.contiguous()  # a hook of saved tensors may have changed it
        launch(records.PpoLossBackward(grads.numel(), grad_loss, grads), grads)
    else:  # out of place: a kept graph needs the gradients again
        grads = grads * grad_loss
    slots = iter(grads.unbind() if ctx.wants.count(True) > 1 else (grads,))
    return tuple([next(slots) if want else None for want in ctx.wants])


_TRAINED = ("inputs.logprobs", "inputs.values", "inputs.entropy")
for _name in ("clipped_policy_loss", "clipped_value_loss", "ppo_loss"):
    _fused(_name)
