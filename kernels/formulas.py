"""The token-level formulas, as in csrc/formulas.h. They compute the same as the torch references in rlhf_fast/ops.

The exponentials are implemented here. Triton has no expm1. Its exp is 2^(x log2 e), and the rounding of that product
makes it inaccurate for large x. CUDA's libdevice does not exist in the interpreter and on other targets.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .records import PolicyTerms

K1 = tl.constexpr(0)
K2 = tl.constexpr(1)
K3 = tl.constexpr(2)
ABS = tl.constexpr(3)

# The log ratio is clamped to +-20, so that its exponential stays finite. NaN is kept.
LOG_RATIO_BOUND = tl.constexpr(20.0)
OVERFLOW = tl.constexpr(89.0)  # e^x is infinite here


@triton.jit
def _split_exponential(x):
    """(half, rest, tail) with e^x = 2 half (1 + rest + tail), for x <= OVERFLOW.

    half is 2^(n - 1) for an integer n; 2^n itself may be 2^128, which is not a float32. It is 0 for x < -86.99. Near 0,
    half = 1/2, rest = x and tail = e^x - 1 - x, so that nothing cancels.
    """
    # 1. x = n log 2 + r with |r| <= log(2) / 2. Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    # log 2 is split in two parts: n times the first is exact, so that r is accurate.
    bounded = tl.where(x < -87.0, -87.0, x)
    shifted = bounded * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = bounded - n * 0.693145752
    r = r - n * 1.42860677e-6
    # 2. e^r - 1 - r = r^2 p(r)
    p = 1.9875691e-4 * r + 1.3981999e-3
    p = p * r + 8.3334519e-3
    p = p * r + 4.1665795e-2
    p = p * r + 1.6666665e-1
    p = p * r + 0.5
    # 3. 2^(n - 1): the integer shifted into the exponent bits
    half = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F000000).to(tl.float32, bitcast=True)
    return half, r, p * (r * r)


@triton.jit
def _at_most_overflow(x):
    return tl.where(x > OVERFLOW, OVERFLOW, x)


@triton.jit
def exponential(x):
    half, rest, tail = _split_exponential(_at_most_overflow(x))
    return 2.0 * (half * (rest + tail) + half)


@triton.jit
def expm1(x):
    """e^x - 1, accurate for small x."""
    half, rest, tail = _split_exponential(_at_most_overflow(x))
    return 2.0 * (half * (rest + tail) + (half - 0.5))


@triton.jit
def k3(x):
    """e^x - 1 - x to a few ulp."""
    x = _at_most_overflow(x)  # infinity - infinity would be NaN
    half, rest, tail = _split_exponential(x)
    return 2.0 * (half * tail + ((half * rest + (half - 0.5)) - 0.5 * x))


@triton.jit
def kl_value(d, ESTIMATOR: tl.constexpr):
    """The estimate of the KL from d = logprob - ref_logprob."""
    if ESTIMATOR == K1:
        value = d
    elif ESTIMATOR == K2:
        value = 0.5 * d * d
    elif ESTIMATOR == K3:
        value = k3(-d)
    else:
        tl.static_assert(ESTIMATOR == ABS, "expected K1, K2, K3 or ABS")
        value = tl.abs(d)
    return value


@triton.jit
def kl_slope(d, ESTIMATOR: tl.constexpr):
    """d value / d logprob. The slope of abs is 0 at NaN, like torch.sign."""
    if ESTIMATOR == K1:
        slope = tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == K2:
        slope = d
    elif ESTIMATOR == K3:
        slope = -expm1(-d)
    else:
        tl.static_assert(ESTIMATOR == ABS, "expected K1, K2, K3 or ABS")
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
    return slope


@triton.jit
def bounded_log_ratio(log_ratio):
    log_ratio = tl.where(log_ratio > LOG_RATIO_BOUND, LOG_RATIO_BOUND, log_ratio)
    return tl.where(log_ratio < -LOG_RATIO_BOUND, -LOG_RATIO_BOUND, log_ratio)


class KernelTerms(NamedTuple):
    """PolicyTerms as one argument of a kernel."""

    low: float  # the bounds of the ratio: computed in the kernel, they would cost it registers
    high: float
    dual_clip: float
    kl_coef: float
    entropy_coef: float
    kl: Any  # a constant: it chooses the code that is compiled
    kl_slope: Any  # so is this; None for a KL of weight 0


def kernel_terms(terms: PolicyTerms) -> KernelTerms:
    return KernelTerms(
        low=1 - terms.clip_low,
        high=1 + terms.clip_high,
        dual_clip=terms.dual_clip,
        kl_coef=terms.kl_coef,
        entropy_coef=terms.entropy_coef,
        kl=tl.constexpr(terms.kl),
        kl_slope=tl.constexpr(terms.kl_slope) if terms.kl_coef != 0 else None,
    )


@triton.jit
def policy_token(log_ratio, ratio, advantage, terms):
    """PPO's clipped loss of a token: (loss, d loss / d logprob, whether it is clipped).

    ``log_ratio`` is the token's, not clamped. ``ratio`` is exp of the clamped log ratio, or the ratio of the token's
    sequence. A tie, or a loss equal to the ceiling, is not clipped.
    """
    clipped_ratio = tl.where(ratio < terms.low, terms.low, ratio)
    clipped_ratio = tl.where(clipped_ratio > terms.high, terms.high, clipped_ratio)
    unclipped = -advantage * ratio
    at_bound = -advantage * clipped_ratio
    ceiling = -advantage * terms.dual_clip
    outside = at_bound > unclipped
    loss = tl.where(outside, at_bound, unclipped)
    over = (advantage < 0.0) & (loss > ceiling)
    clipped = outside | over
    # d ratio / d logprob = ratio, so the slope of the unclipped loss is the loss itself. If the ratio is clipped or the
    # log ratio clamped, the loss does not depend on the log-prob.
    constant = clipped | (tl.abs(log_ratio) > LOG_RATIO_BOUND)
    return tl.where(over, ceiling, loss), tl.where(constant, 0.0, unclipped), clipped


@triton.jit
def value_token(value, old_value, target, terms):
    """0.5 * max((v - R)^2, (clip(v) - R)^2): (loss, d loss / d value, whether it is clipped).

    A tie is not clipped.
    """
    lowest = old_value - terms.clip
    highest = old_value + terms.clip
    clipped_value = tl.where(value < lowest, lowest, value)
    clipped_value = tl.where(clipped_value > highest, highest, clipped_value)
    error = value - target
    clipped_error = clipped_value - target
    squared = error * error
    clipped_squared = clipped_error * clipped_error
    clipped = clipped_squared > squared
    return 0.5 * tl.where(clipped, clipped_squared, squared), tl.where(clipped, 0.0, error), clipped


@triton.jit
def gae_gain(reward, value, gamma_lam, gamma_rest):
    """The gain of a token in the recurrence of GAE. With g_t = gamma * value_t + gamma_lam * advantage_t,

        advantage_t = reward_t - value_t + g_{t+1}
        g_t         = gain_t + gamma_lam * g_{t+1}

    so that only one number is carried from token to token. ``gamma_rest`` is gamma - gamma_lam, subtracted in float64,
    so that it is exactly 0 at lam = 1. The term value - value is NaN for an infinite value, which makes all earlier
    tokens NaN, as in the torch reference.
    """
    return gamma_lam * reward + gamma_rest * value + (value - value)


# ---- gated activations: a(x) * up -----------------------------------------------------------------------------------

SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
GELU = tl.constexpr(2)
RELU = tl.constexpr(3)


@triton.jit
def sigmoid_gate(x, u, rise):
    """(x * sigmoid(u), its slope); ``rise`` is du/dx. The bound on u keeps 1 - sigmoid(u) = e^-u sigmoid(u) finite."""
    e = exponential(tl.where(u < -87.0, 87.0, -u))
    sigmoid = 1.0 / (1.0 + e)
    value = x * sigmoid
    return value, sigmoid + value * (e * sigmoid) * rise


@triton.jit
def normal_share(x, bell):
    """Phi(x), the normal distribution function. ``bell`` is e^(-x^2 / 2).

    For x < 0 it is erfc(|x| / sqrt(2)) / 2 with a relative error of 1.2e-7 (Press et al., Numerical Recipes, 2nd
    edition, section 6.2), else 1 minus that.
    """
    t = 1.0 / (1.0 + tl.abs(x) * 0.353553391)
    p = 0.17087277 * t - 0.82215223
    p = p * t + 1.48851587
    p = p * t - 1.13520398
    p = p * t + 0.27886807
    p = p * t - 0.18628806
    p = p * t + 0.09678418
    p = p * t + 0.37409196
    p = p * t + 1.00002368
    p = p * t - 1.26551223
    tail = 0.5 * t * bell * exponential(p)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """(a(x), a'(x))"""
    if ACTIVATION == SILU:
        value, slope = sigmoid_gate(x, x, 1.0)
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(z)) / 2 = sigmoid(2 z), 2 z = sqrt(8 / pi) (x + 0.044715 x^3); for |x| > 30 it is 0 or 1
        near = tl.where(x > 30.0, 30.0, x)
        near = tl.where(x < -30.0, -30.0, near)
        square = near * near
        u = 1.59576912 * near * (1.0 + 0.044715 * square)
        value, slope = sigmoid_gate(x, u, 1.59576912 + 0.214064449 * square)
    elif ACTIVATION == GELU:
        bell = exponential(-0.5 * x * x)
        share = normal_share(x, bell)
        value = x * share
        slope = share + 0.398942280 * x * bell
    else:
        tl.static_assert(ACTIVATION == RELU, "no such activation")
        value = tl.where(x <= 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    return value, slope
