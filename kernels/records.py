"""The arguments of every launcher, declared once: an operation fills a record in, by name, and a kernel gets it.

A Triton launcher takes the record itself. The compiled engine reads it, field by field, into the C structure of the
same name, which csrc/write_records.py writes to csrc/records.h from this file: a tensor becomes its data_ptr, None a
null pointer. The compiled module tells the digest of the records that it was compiled with, and is refused where that
is not this file's (``rlhf_fast/ops/_native.py``).

``live`` is one byte a token, 0 = does not count and is not read; None = every token counts. Outputs are written whole.
A result depends neither on the number of threads nor on where a row stands. Sizes and strides are in elements.
"""

import hashlib
import math
import sys
import typing
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
# The codes of the C enums, by position.
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
ENUMS = {
    "DType": tuple(DTYPES.values()),
    "Kl": KL_ESTIMATORS,
    "Activation": ACTIVATIONS,
    "Aggregation": tuple(name.replace("-", "_") for name in AGGREGATIONS),
}


class Range:
    """The finite numbers that a caller may give for a field: ``least`` to ``most``, both included."""

    def __init__(self, lowest: float, highest: float = math.inf, above: bool = False, optional: bool = False) -> None:
        """``above`` leaves out the lowest. An ``optional`` field may be None, which reaches the kernels as +inf."""
        self.least = math.nextafter(lowest, math.inf) if above else lowest
        self.most = min(highest, sys.float_info.max)
        self.optional = optional
        self.text = f"a finite number {'>' if above else '>='} {lowest:g}{', or None' if optional else ''}"
        if highest < math.inf:
            self.text = f"in [{lowest:g}, {highest:g}]"


# Python's type of a field, and C's.
Size = Annotated[int, "int64_t"]
Number = Annotated[float, "float"]
Double = Annotated[float, "double"]
Flag = Annotated[bool, "bool"]
DTypeCode = Annotated[int, "DType"]
KlCode = Annotated[int, "Kl"]
ActivationCode = Annotated[int, "Activation"]
AggregationCode = Annotated[int, "Aggregation"]
Data = Annotated[Tensor, "void*"]
In = Annotated[Tensor, "const float*"]
Out = Annotated[Tensor, "float*"]
Ids = Annotated[Tensor, "const int64_t*"]
Live = Annotated[Tensor, "const uint8_t*"]
Doubles = Annotated[Tensor, "const double*"]
OutDoubles = Annotated[Tensor, "double*"]
Given = Annotated[Tensor, "or None"]  # of an op's inputs: whoever has none does not read it

STATISTICS = 4  # floats a row that the backward of the vocabulary-level launchers needs


# ---- vocabulary level: one row is one token -------------------------------------------------------------------------


class Rows(NamedTuple):
    length: Size  # rows
    vocab: Size  # columns in the softmax
    targets: Ids | None  # (length,); in [0, vocab) where live
    live: Live | None  # (length,)
    temperatures: In | None  # (length,); None = all rows have ``temperature``
    temperature_stride: Size  # of temperatures
    temperature: Number
    softcap: Number  # 0 = none


class Logits(NamedTuple):
    """Rows of logits, or of their gradient; the column stride is 1."""

    data: Data | None  # None = not wanted
    dtype: DTypeCode
    row_stride: Size


class MaskedLogprobs(NamedTuple):
    rows: Rows
    logits: Logits
    logprobs: Out
    entropy: Out | None  # None = not wanted
    statistics: Out  # (length, STATISTICS)


class MaskedLogprobsBackward(NamedTuple):
    rows: Rows
    logits: Logits
    columns: Size  # of grad; those past vocab get 0
    statistics: In
    logprobs: In
    entropy: In | None  # needed with grad_entropy
    grad_logprobs: In | None  # (length,), or None = 0
    grad_entropy: In | None  # (length,), or None = 0
    grad: Logits  # may be the logits themselves


class ExactKl(NamedTuple):
    rows: Rows  # no targets, no softcap
    logits: Logits
    ref_logits: Logits
    kl: Out
    statistics: Out  # (length, STATISTICS)


class ExactKlBackward(NamedTuple):
    rows: Rows
    logits: Logits
    ref_logits: Logits
    statistics: In
    kl: In
    grad_kl: In  # (length,)
    grad: Logits  # may be the logits themselves


# ---- the fold of the ops with an lm head: a tile of logits and its gradient -----------------------------------------
#
# The logits are float32. The gradient may lie over them, each row where its logits start; on CUDA a narrower one may
# not.


class LinearLogprobs(NamedTuple):
    """logprobs and entropy of every row, and grad_logprobs * d logprob + grad_entropy * d entropy."""

    rows: Rows
    logits: Logits
    logprobs: Out
    entropy: Out | None  # None = not wanted
    grad: Logits
    grad_logprobs: In | None  # (length,), or None = 1
    grad_entropy: In | None  # (length,), or None = 0


class PolicyTerms(NamedTuple):
    """The scalars of the losses with a policy. Each default leaves its term out."""

    clip_low: Annotated[Number, Range(0, 1)] = 1.0  # the ratio is held within [1 - clip_low, 1 + clip_high]
    clip_high: Annotated[Number, Range(0)] = math.inf
    dual_clip: Annotated[Number, Range(1, above=True, optional=True)] = math.inf  # +inf = none
    kl_coef: Annotated[Number, Range(0)] = 0.0
    entropy_coef: Annotated[Number, Range(0)] = 0.0
    kl: KlCode = 0  # whose value the KL has
    kl_slope: KlCode = 0  # and whose slope ("k3+" has k2's)


class ValueTerms(NamedTuple):
    """The scalars of the losses with a value."""

    clip: Annotated[Number, Range(0, above=True, optional=True)] = math.inf  # +inf = none
    coef: Annotated[Number, Range(0)] = 1.0


class LinearPolicyLoss(NamedTuple):
    """As LinearLogprobs, with the gradient of share * (policy loss + kl_coef * KL - entropy_coef * entropy)."""

    rows: Rows
    logits: Logits
    old_logprobs: In
    advantages: In
    ref_logprobs: In | None  # None = no KL
    share: In  # (length,) of the token in the loss
    terms: PolicyTerms
    grad: Logits
    logprobs: Out
    entropy: Out


class LinearPolicyRef(NamedTuple):
    """Policy and reference side by side, a tile of logits each; the gradient is that of the policy's:
    grad_logprobs * d logprob + grad_entropy * d entropy + grad_kl * d KL.
    """

    rows: Rows
    logits: Logits
    ref_logits: Logits
    logprobs: Out
    ref_logprobs: Out
    entropy: Out
    kl: Out
    grad: Logits
    grad_logprobs: In | None  # these three, (length,), with grad
    grad_entropy: In | None
    grad_kl: In | None


# ---- token level ----------------------------------------------------------------------------------------------------


class TokenKl(NamedTuple):
    tokens: Size
    logprobs: In
    ref_logprobs: In
    live: Live | None
    estimator: KlCode
    kl: Out


class TokenKlBackward(NamedTuple):
    tokens: Size
    logprobs: In
    ref_logprobs: In
    live: Live | None
    slope: KlCode
    grad_kl: In
    grad: Out


class Gae(NamedTuple):
    sequences: Size
    length: Size  # of a padded row; of all sequences together where cu_seqlens is given
    cu_seqlens: Ids | None  # (sequences + 1,) bounds of packed sequences, or None = padded
    rewards: In
    values: In
    live: Live | None
    gamma: Double
    lam: Double
    whiten: Flag  # advantages alone
    advantages: Out
    returns: Out


class MaskedMoments(NamedTuple):
    """Count and sum of the live elements or, with a mean, count and sum of squared deviations from it."""

    elements: Size
    x: In
    live: Live | None
    mean: Doubles | None
    moments: OutDoubles  # 2


class MaskedWhiten(NamedTuple):
    """(x - mean) * scale, + mean where not shift_mean. With statistics given they are used, else they are computed."""

    elements: Size
    x: In
    live: Live | None
    shift_mean: Flag
    unbiased: Flag
    given: Flag  # statistics are an input
    statistics: OutDoubles  # 3: live elements, mean, scale = 1 / sqrt(variance + 1e-8)
    whitened: Out


class MaskedWhitenBackward(NamedTuple):
    elements: Size
    x: In
    live: Live | None
    shift_mean: Flag
    unbiased: Flag
    statistics: Doubles
    grad_whitened: In
    grad: Out


class LossDivisor(NamedTuple):
    """What an aggregated loss is divided by."""

    aggregation: AggregationCode
    number: Double  # num_items, where it is known; below 0 = count here
    items: Doubles | None  # or it is there, on the device: CUDA alone


class PpoLoss(NamedTuple):
    """policy + value_coef * value + kl_coef * KL - entropy_coef * entropy; or the policy's or the value's alone.

    The statistics are, of what is there,
    - of the joint loss its terms: policy, value, KL, entropy;
    - of the policy: clip_fraction, approx_kl, ratio_mean, ratio_max, ratio_var;
    - of the value: clip_fraction;
    - always: what the gradients are still to be multiplied by.
    """

    policy: Flag  # what is there; the other's data is not read
    value: Flag
    sequences: Size
    length: Size
    logprobs: In | None
    old_logprobs: In | None
    advantages: In | None
    values: In | None
    old_values: In | None
    returns: In | None
    entropy: In | None
    ref_logprobs: In | None
    live: Live | None
    sequence_level: Flag  # ratios by the sequence
    terms: PolicyTerms
    value_terms: ValueTerms
    divisor: LossDivisor
    loss: Out  # 1
    statistics: Out
    grad_logprobs: Out | None  # these three of the loss, (sequences, length); None = not wanted
    grad_values: Out | None
    grad_entropy: Out | None


# ---- layers of a transformer: the elementwise passes between its matrix products -------------------------------------


class Hidden(NamedTuple):
    """Rows of numbers of the record's dtype; the column stride is 1."""

    data: Data | None  # None = not wanted
    row_stride: Size


class RmsNorm(NamedTuple):
    """weight * x / sqrt(mean(x^2) + eps) of every row."""

    tokens: Size
    width: Size
    dtype: DTypeCode
    hidden: Hidden
    weight: In | None  # (width,); None = 1
    eps: Number
    normed: Hidden
    scale: Out  # (tokens,) 1 / sqrt(mean(x^2) + eps)


class RmsNormBackward(NamedTuple):
    tokens: Size
    width: Size
    dtype: DTypeCode
    hidden: Hidden
    weight: In | None
    scale: In
    grad_normed: Hidden
    grad_hidden: Hidden
    grad_weight: Out | None  # (width,); None = not wanted


class GatedActivation(NamedTuple):
    """activation(gate) * up."""

    tokens: Size
    width: Size
    dtype: DTypeCode
    activation: ActivationCode
    gate: Hidden
    up: Hidden
    product: Hidden


class GatedActivationBackward(NamedTuple):
    tokens: Size
    width: Size
    dtype: DTypeCode
    activation: ActivationCode
    gate: Hidden
    up: Hidden
    grad_product: Hidden
    grad_gate: Hidden
    grad_up: Hidden


class Heads(NamedTuple):
    """data[sequence, head, token] is a head of a token, whose numbers lie side by side."""

    data: Data
    sequence_stride: Size
    head_stride: Size
    token_stride: Size


class Angles(NamedTuple):
    """cos and sin [sequence, token], in rows of ``turned`` numbers."""

    cos: Data
    sin: Data
    dtype: DTypeCode  # float32, or that of the heads
    sequence_stride: Size  # 0 where all sequences share them
    token_stride: Size


class RotaryEmbedding(NamedTuple):
    """Turns the pairs (j, j + turned / 2) of a head's first ``turned`` numbers; the others are copied."""

    sequences: Size
    heads: Size
    length: Size
    width: Size  # of a head
    turned: Size  # even, at most width
    dtype: DTypeCode
    x: Heads
    angles: Angles
    backward: Flag  # the other way round: the gradient of x from that of the result
    out: Heads


Record = (
    MaskedLogprobs
    | MaskedLogprobsBackward
    | ExactKl
    | ExactKlBackward
    | LinearLogprobs
    | LinearPolicyLoss
    | LinearPolicyRef
    | TokenKl
    | TokenKlBackward
    | Gae
    | MaskedMoments
    | MaskedWhiten
    | MaskedWhitenBackward
    | PpoLoss
    | RmsNorm
    | RmsNormBackward
    | GatedActivation
    | GatedActivationBackward
    | RotaryEmbedding
)
# A launcher has the same name in every engine: in csrc/cpu, csrc/cuda and kernels.
LAUNCHERS: dict[str, type[Record]] = {
    "masked_logprobs": MaskedLogprobs,
    "masked_logprobs_backward": MaskedLogprobsBackward,
    "exact_kl": ExactKl,
    "exact_kl_backward": ExactKlBackward,
    "linear_logprobs": LinearLogprobs,
    "linear_policy_loss": LinearPolicyLoss,
    "linear_policy_ref": LinearPolicyRef,
    "token_kl": TokenKl,
    "token_kl_backward": TokenKlBackward,
    "gae": Gae,
    "masked_moments": MaskedMoments,
    "masked_whiten": MaskedWhiten,
    "masked_whiten_backward": MaskedWhitenBackward,
    "ppo_loss": PpoLoss,
    "rms_norm": RmsNorm,
    "rms_norm_backward": RmsNormBackward,
    "gated_activation": GatedActivation,
    "gated_activation_backward": GatedActivationBackward,
    "rotary_embedding": RotaryEmbedding,
}
NAMES = {record: name for name, record in LAUNCHERS.items()}


# ---- what csrc/write_records.py writes and the compiled module was written from --------------------------------------


def is_record(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "_fields")


def fields_of(record: type) -> dict[str, Any]:
    """Name -> the C type of a field, or the class of a nested record."""
    found = {}
    for name, annotation in typing.get_type_hints(record, include_extras=True).items():
        given = [part for part in (annotation, *typing.get_args(annotation)) if hasattr(part, "__metadata__")]
        found[name] = given[0].__metadata__[0] if given else annotation
    return found


def ranges_of(record: type) -> dict[str, Range]:
    """Name -> what a caller may give, of the fields that declare it."""
    hints = typing.get_type_hints(record, include_extras=True)
    return {
        name: part
        for name, hint in hints.items()
        for part in getattr(hint, "__metadata__", ())
        if isinstance(part, Range)
    }


def structures() -> dict[type, dict[str, Any]]:
    """Every record with its fields, after those that it holds."""
    found: dict[type, dict[str, Any]] = {}

    def add(record: type) -> None:
        fields = fields_of(record)
        for kind in fields.values():
            if is_record(kind):
                add(kind)
        found.setdefault(record, fields)

    for record in LAUNCHERS.values():
        add(record)
    return found


def digest() -> str:
    """Of all fields: equal where the compiled module reads the records of this file."""
    layout = {
        record.__name__: [(name, getattr(kind, "__name__", kind)) for name, kind in fields.items()]
        for record, fields in structures().items()
    }
    launchers = {name: record.__name__ for name, record in LAUNCHERS.items()}
    return hashlib.sha256(repr((ENUMS, layout, launchers)).encode()).hexdigest()[:16]
