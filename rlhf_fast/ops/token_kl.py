"""Per-token estimates of KL(policy || reference) from the log-probs of the sampled tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._aggregate import upcast
from ._dispatch import implementation, implements, launch
from ._losses import ESTIMATORS, KL_CODES
from ._op import empty_contiguous, fused_op


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None = None, *, estimator: str = "k1") -> Tensor:
    """One KL estimate per token, with d = logprobs - ref_logprobs (Schulman, "Approximating KL Divergence", 2020).

    | name | value           | slope (d value / d logprobs) |                                                         |
    |------|-----------------|------------------------------|---------------------------------------------------------|
    | k1   | d               | 1                            | unbiased value, high variance, may be negative          |
    | k2   | d^2 / 2         | d                            | biased value, low variance                              |
    | k3   | exp(-d) - 1 + d | 1 - exp(-d)                  | unbiased value, low variance, never negative            |
    | abs  | abs(d)          | sign(d)                      | distance, not a divergence; offered by TRL and verl     |
    | x+   | that of x       | d                            | straight-through: the value of x with the slope of k2   |

    Use a "+" form where the estimate itself is a loss term. Over samples of the policy, the gradient of KL is
    E[d * grad logprob], which is k2's slope. k1's slope has expectation 0, and k3's is that of the reverse KL, so
    minimising k1 or k3 does not minimise this KL. (verl has the same as ``kl_penalty="k3+"``.)

    Args:
        logprobs: of the policy, any shape, float; natural logarithm. The only input with a gradient.
        ref_logprobs: of the reference, same shape; a constant.
        mask: same shape, bool or 0/1, 1 = counts. Masked tokens are not read; their output and gradient are 0.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        estimator: a name of the table ("k1+", "k3+", "abs+" are the straight-through ones).

    Returns:
        Same shape; float32, or float64 when an input is float64. A live -inf only in ``logprobs`` gives -inf (k1) or
        +inf (the others); only k1 and abs have a finite slope there. NaN, or -inf in both, gives NaN.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; unknown estimator.
    """
    _checks.alike("token_kl", "that of logprobs", logprobs=logprobs, ref_logprobs=ref_logprobs)
    _checks.one_of("token_kl", "estimator", estimator, ESTIMATORS)
    live = _checks.live_mask("token_kl", mask, logprobs.shape, logprobs.device)

    logprobs, ref_logprobs = upcast(logprobs, _checks.constant(ref_logprobs))
    return estimates(logprobs, ref_logprobs, live, *KL_CODES[estimator])


def estimates(logprobs: Tensor, ref_logprobs: Tensor, live: Tensor | None, value: int, slope: int) -> Tensor:
    """``token_kl`` without checks: tensors of one shape and dtype, a bool mask, the codes of an estimator."""
    return implementation("token_kl", logprobs)(Inputs(logprobs, ref_logprobs, live, value, slope))


class Inputs(NamedTuple):
    logprobs: Tensor  # any shape; ref_logprobs and live have the same
    ref_logprobs: Tensor
    live: Tensor | None
    estimator: int  # index in records.KL_ESTIMATORS of the formula of the value
    slope: int  # and of its derivative


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("token_kl", "torch")
def _torch(inputs: Inputs) -> Tensor:
    return _TokenKL.apply(*inputs)


class _TokenKL(torch.autograd.Function):
    """Has its own gradient, because autograd's k3 slope, 1 - exp(-d), loses all digits for small d."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logprobs: Tensor, ref_logprobs: Tensor, live: Tensor | None, estimator: int, slope: int) -> Tensor:
        return _value(_difference(logprobs, ref_logprobs, live), records.KL_ESTIMATORS[estimator])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, ctx.slope = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, ref_logprobs, live = ctx.saved_tensors
        grad = grads[0] * _slope(_difference(logprobs, ref_logprobs, live), records.KL_ESTIMATORS[ctx.slope])
        return grad if live is None else torch.where(live, grad, 0.0), *(None,) * 4


def _difference(logprobs: Tensor, ref_logprobs: Tensor, live: Tensor | None) -> Tensor:
    difference = logprobs - ref_logprobs
    return difference if live is None else torch.where(live, difference, 0.0)


def _value(difference: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return difference.clone()
    if estimator == "k2":
        return 0.5 * difference * difference
    if estimator == "k3":
        return _k3(-difference)
    if estimator == "abs":
        return difference.abs()
    raise ValueError(f"no formula for the value of {estimator}")


def _slope(difference: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return torch.ones_like(difference)
    if estimator == "k3":
        return -torch.expm1(-difference)
    if estimator == "abs":
        return difference.sign()
    if estimator == "k2":
        return difference
    raise ValueError(f"no formula for the slope of {estimator}")


def _k3(x: Tensor) -> Tensor:
    """exp(x) - 1 - x to a few ulp.

    expm1(x) - x cancels for small x, where the result is about x^2 / 2. For abs(x) < 1/2 the series is summed instead:
    x^2/2 * (1 + x/3 * (1 + x/4 * (1 + ...))), whose 15 terms give float64 accuracy.
    """
    tail = torch.ones_like(x)
    for n in range(16, 2, -1):
        tail = 1 + tail * x / n
    # the bound avoids inf - inf; expm1 overflows before x reaches it
    return torch.where(x.abs() < 0.5, 0.5 * x * x * tail, torch.expm1(x) - x.clamp(max=1000.0))


# ---- on the engines: one pass forward, one backward -----------------------------------------------------------------


def _kernel(inputs: Inputs) -> Tensor:
    logprobs, kl = inputs.logprobs, empty_contiguous(inputs.logprobs)
    launch(
        records.TokenKl(
            tokens=logprobs.numel(),
            logprobs=logprobs.contiguous(),
            ref_logprobs=inputs.ref_logprobs.contiguous(),
            live=None if inputs.live is None else inputs.live.contiguous(),
            estimator=inputs.estimator,
            kl=kl,
        ),
        kl,
    )
    return kl


class _Backward(NamedTuple):
    grad_kl: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    live: Tensor | None
    slope: int


def _backward_kernel(inputs: _Backward) -> Tensor:
    logprobs, grad = inputs.logprobs, empty_contiguous(inputs.logprobs)
    launch(
        records.TokenKlBackward(
            tokens=logprobs.numel(),
            logprobs=logprobs.contiguous(),
            ref_logprobs=inputs.ref_logprobs.contiguous(),
            live=None if inputs.live is None else inputs.live.contiguous(),
            slope=inputs.slope,
            grad_kl=inputs.grad_kl.contiguous(),
            grad=grad,
        ),
        grad,
    )
    return grad


def _fake(inputs: Inputs | _Backward) -> Tensor:
    return empty_contiguous(inputs.logprobs)


def _save(ctx: Any, inputs: Inputs, output: Tensor) -> None:
    logprobs, ref_logprobs, live, _, ctx.slope = inputs
    ctx.save_for_backward(logprobs, ref_logprobs, live)


def _gradient(ctx: Any, grad_kl: Tensor) -> tuple[Tensor]:
    logprobs, ref_logprobs, live = ctx.saved_tensors
    return (_backward(_Backward(grad_kl, logprobs, ref_logprobs, live, ctx.slope)),)


_backward = fused_op("token_kl_backward", _Backward, _backward_kernel, _fake)
implements("token_kl", "fused")(
    fused_op("token_kl", Inputs, _kernel, _fake, trained=("logprobs",), save=_save, gradient=_gradient)
)
