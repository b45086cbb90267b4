"""Per-token estimates of KL(policy || reference) from the log-probs of the sampled tokens."""

from typing import Any

import torch

from rlhf_fast.ops import _checks
from rlhf_fast.ops._aggregate import upcast
from rlhf_fast.ops._dispatch import implementation, implements

ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")


def token_kl(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor | None = None, *, estimator: str = "k1"
) -> torch.Tensor:
    """One KL estimate a token, with d = logprobs - ref_logprobs (Schulman, "Approximating KL Divergence", 2020).

    | name | value           | slope (d value / d logprobs) |                                                         |
    |------|-----------------|------------------------------|---------------------------------------------------------|
    | k1   | d               | 1                            | unbiased value, high variance, may be negative          |
    | k2   | d^2 / 2         | d                            | biased value, low variance                              |
    | k3   | exp(-d) - 1 + d | 1 - exp(-d)                  | unbiased value, low variance, never negative            |
    | abs  | abs(d)          | sign(d)                      | distance, not a divergence; offered by TRL and verl     |
    | x+   | that of x       | d                            | straight-through: the value of x with the slope of k2   |

    Use a "+" form where the estimate itself is a loss term. Over samples of the policy, the gradient of KL is
    E[d * grad logprob]: k2's slope exactly. k1's slope has expectation 0 and k3's is that of the reverse KL, so
    minimising either of them does not minimise this KL. (The same idea is ``kl_penalty="k3+"`` in verl.)

    Args:
        logprobs: of the policy, any shape, float; natural logarithm. The gradient goes here alone.
        ref_logprobs: of the reference, same shape; taken as a constant.
        mask: same shape, bool or 0/1, 1 = counts. Elsewhere the output and the gradient are 0 and nothing is read.
            A value other than 0 and 1 is an error on the CPU; on a GPU, where asking would wait, it counts as 1.
        estimator: a name of the table ("k1+", "k3+", "abs+" are the straight-through ones).

    Returns:
        Same shape; float32, or float64 when an input is float64. A live -inf in ``logprobs`` alone gives -inf (k1)
        or +inf (the others), where only the slopes of k1 and abs stay finite; NaN, or -inf in both, gives NaN.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices differ; unknown estimator.
    """
    _checks.floating("token_kl", logprobs=logprobs, ref_logprobs=ref_logprobs)
    _checks.shaped("token_kl", logprobs.shape, "that of logprobs", ref_logprobs=ref_logprobs)
    _checks.same_device("token_kl", logprobs=logprobs, ref_logprobs=ref_logprobs)
    _checks.one_of("token_kl", "estimator", estimator, ESTIMATORS)
    live = _checks.live_mask("token_kl", mask, logprobs.shape, logprobs.device)

    logprobs, ref_logprobs = upcast(logprobs, _checks.constant(ref_logprobs))
    flat = implementation("token_kl", logprobs)(
        logprobs.reshape(-1), ref_logprobs.reshape(-1), None if live is None else live.reshape(-1), estimator
    )
    return flat.view(logprobs.shape)


@implements("token_kl", "torch")
def _torch(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, live: torch.Tensor | None, estimator: str
) -> torch.Tensor:
    """(N,) three times, one dtype -> (N,)."""
    return _TokenKL.apply(logprobs, ref_logprobs, live, estimator)


class _TokenKL(torch.autograd.Function):
    """Written out, because autograd's own k3 slope, 1 - exp(-d), loses all its digits where d is small."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logprobs: torch.Tensor, ref_logprobs: torch.Tensor, live: torch.Tensor | None, estimator: str
    ) -> torch.Tensor:
        return _value(_difference(logprobs, ref_logprobs, live), estimator.removesuffix("+"))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        *tensors, ctx.estimator = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logprobs, ref_logprobs, live = ctx.saved_tensors
        grad = grads[0] * _slope(_difference(logprobs, ref_logprobs, live), ctx.estimator)
        return grad if live is None else torch.where(live, grad, 0.0), None, None, None


def _difference(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    difference = logprobs - ref_logprobs
    return difference if live is None else torch.where(live, difference, 0.0)


def _value(difference: torch.Tensor, estimator: str) -> torch.Tensor:
    if estimator == "k1":
        return difference.clone()
    if estimator == "k2":
        return 0.5 * difference * difference
    if estimator == "k3":
        return _k3(-difference)
    return difference.abs()


def _slope(difference: torch.Tensor, estimator: str) -> torch.Tensor:
    if estimator == "k1":
        return torch.ones_like(difference)
    if estimator == "k3":
        return -torch.expm1(-difference)
    if estimator == "abs":
        return difference.sign()
    return difference


def _k3(x: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 - x to a few units in the last place.

    Even expm1(x) - x cancels for small x, where the result is x^2 / 2; there the series is summed instead:
    x^2/2 * (1 + x/3 * (1 + x/4 * (1 + ...))), which at abs(x) < 1/2 and 15 terms is exact to float64.
    """
    tail = torch.ones_like(x)
    for n in range(16, 2, -1):
        tail = 1 + tail * x / n
    # the bound keeps inf - inf out; wherever it acts, expm1(x) is infinite already
    return torch.where(x.abs() < 0.5, 0.5 * x * x * tail, torch.expm1(x) - x.clamp(max=1000.0))
