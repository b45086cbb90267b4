"""The arguments of every launcher, declared once as records: an operation fills one in and passes it to a launcher.

A Triton launcher takes the record itself. The compiled engine reads it, field by field, into the C structure of the
same name, which csrc/write_records.py writes to csrc/records.h from this file: a tensor becomes its data_ptr, None a
null pointer. The compiled module has a digest of the records that it was compiled with; ``rlhf_fast/ops/_native.py``
refuses a module whose digest differs from this file's.

``live`` is one byte per token, 0 = does not count and is not read; None = every token counts. Outputs are written
completely. A result depends neither on the number of threads nor on the position of a row. Sizes and strides are in
elements.
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
        """``above`` excludes the lowest number. An ``optional`` field may be None, passed to the kernels as +inf."""
        self.least = math.nextafter(lowest, math.inf) if above else lowest
        self.most = min(highest, sys.float_info.max)
        self.optional = optional
        self.text = f"a finite number {'>' if above else '>='} {lowest:g}{', or None' if optional else ''}"
        if highest < math.inf:
            self.text = f"in [{lowest:g}, {highest:g}]"


# The Python type of a field, and its C type.
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
Given = Annotated[Tensor, "or None"]  # an input of an op that may be None where the op does not read it

NO_INDEX = -(2**63)  # an ignore_index that no target has
STATISTICS = 4  # floats per row that the vocabulary-level launchers save for their backward
EXTRAS = 3  # floats per row: mean logit, log of the sum of squared probabilities, whether the target is top-1


# ---- vocabulary level: one row is one token -------------------------------------------------------------------------


class Rows(NamedTuple):
    length: Size  # rows
    vocab: Size  # columns in the softmax
    targets: Ids | None  # (length,); in [0, vocab) where live
    live: Live | None  # (length,)
    ignore_index: Size  # a row with this target does not count either
    temperatures: In | None  # (length,); None = all rows have ``temperature``
    temperature_stride: Size  # stride of temperatures
    temperature: Number
    softcap: Number  # 0 = none


class Logits(NamedTuple):
    """Rows of logits, or of their gradient, ``batch_rows`` of them in each batch; the column stride is 1."""

    data: Data | None  # None = not wanted
    dtype: DTypeCode
    row_stride: Size
    batch_rows: Size
    batch_stride: Size


class RowOutputs(NamedTuple):
    """What is computed of each row, (length,), 0 where it does not count."""

    logprobs: Out
    entropy: Out | None = None  # None = not wanted
    logsumexp: Out | None = None  # None = neither this nor extras is wanted; with it, entropy is wanted too
    extras: Out | None = None  # (length, EXTRAS)


class MaskedLogprobs(NamedTuple):
    rows: Rows
    logits: Logits
    outputs: RowOutputs
    statistics: Out  # (length, STATISTICS)


class MaskedLogprobsBackward(NamedTuple):
    rows: Rows
    logits: Logits
    columns: Size  # columns of grad; columns past vocab get 0
    statistics: In
    logprobs: In
    entropy: In | None  # needed with grad_entropy
    grad_logprobs: In | None  # (length,), or None = 0
    grad_entropy: In | None  # (length,), or None = 0
    grad_logsumexp: In | None  # (length,), or None = 0
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


# ---- the fold of the ops with an lm head (rlhf_fast/ops/_sweep.py): logits to results and gradient -------------------
#
# The logits are float32. The gradient may overwrite them in place, each row from the start of its logits; on CUDA only
# if it is float32 too.


class LinearLogprobs(NamedTuple):
    """The outputs of every row, and grad: grad_logprobs * d logprob + the same of entropy and logsumexp."""

    rows: Rows
    logits: Logits
    outputs: RowOutputs
    grad: Logits
    grad_logprobs: In | None  # (length,), or None = 1
    grad_entropy: In | None  # (length,), or None = 0
    grad_logsumexp: In | None  # (length,), or None = 0


class PolicyTerms(NamedTuple):
    """The scalars of the losses with a policy. Each default leaves its term out."""

    clip_low: Annotated[Number, Range(0, 1)] = 1.0  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: Annotated[Number, Range(0)] = math.inf
    dual_clip: Annotated[Number, Range(1, above=True, optional=True)] = math.inf  # +inf = none
    kl_coef: Annotated[Number, Range(0)] = 0.0
    entropy_coef: Annotated[Number, Range(0)] = 0.0
    kl: KlCode = 0  # the formula of the KL's value
    kl_slope: KlCode = 0  # and of its slope ("k3+" has k2's)


class ValueTerms(NamedTuple):
    """The scalars of the losses with a value."""

    clip: Annotated[Number, Range(0, above=True, optional=True)] = math.inf  # +inf = none
    coef: Annotated[Number, Range(0)] = 1.0


class LinearPolicyLoss(NamedTuple):
    """Like LinearLogprobs, with the gradient of share * (policy loss + kl_coef * KL - entropy_coef * entropy).

    The KL is the exact one of ``ref_logits`` or the estimate from ``ref_logprobs``; without both there is none.
    """

    rows: Rows
    logits: Logits
    ref_logits: Logits
    old_logprobs: In
    advantages: In
    ref_logprobs: In | None  # needed for an estimate with kl_coef
    share: In  # (length,) the weight of the token in the loss
    terms: PolicyTerms
    grad: Logits
    logprobs: Out
    entropy: Out
    kl: Out | None  # the exact KL; needed with ref_logits


class LinearPolicyRef(NamedTuple):
    """Log-probs of policy and reference, entropy and KL from the logits of both. The gradient is by the policy's
    logits: grad_logprobs * d logprob + grad_entropy * d entropy + grad_kl * d KL.
    """

    rows: Rows
    logits: Logits
    ref_logits: Logits
    logprobs: Out
    ref_logprobs: Out
    entropy: Out
    kl: Out
    grad: Logits
    grad_logprobs: In | None  # this, grad_entropy and grad_kl: (length,), needed with grad
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
    length: Size  # tokens of a padded row; with cu_seqlens, tokens of all sequences together
    cu_seqlens: Ids | None  # (sequences + 1,) bounds of packed sequences, or None = padded
    rewards: In
    values: In
    live: Live | None
    gamma: Double
    lam: Double
    whiten: Flag  # whitens the advantages, not the returns
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
    """(x - mean) * scale, + mean without shift_mean. With ``given``, statistics are an input, else an output."""

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
    """The divisor of an aggregated loss."""

    aggregation: AggregationCode
    number: Double  # num_items; below 0 = the launcher counts
    items: Doubles | None  # num_items on the device, used instead of number; only on CUDA


class PpoLoss(NamedTuple):
    """policy + value_coef * value + kl_coef * KL - entropy_coef * entropy; or only the policy or the value loss.

    The statistics, in this order:
    - with policy and value, the terms: policy, value, KL, entropy;
    - with policy: clip_fraction, approx_kl, ratio_mean, ratio_max, ratio_var;
    - with value: clip_fraction.
    """

    policy: Flag  # whether the loss has a policy term; if not, its data is not read
    value: Flag  # the same for the value term
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
    sequence_level: Flag  # ratios per sequence
    terms: PolicyTerms
    value_terms: ValueTerms
    divisor: LossDivisor
    loss: Out  # 1
    statistics: Out
    grad_logprobs: Out | None  # the three gradients of the loss: (sequences, length); None = not wanted
    grad_values: Out | None
    grad_entropy: Out | None


class PpoLossBackward(NamedTuple):
    """Multiplies the gradients by that of the loss, in place; where it is 1 they are left as they are."""

    elements: Size
    grad_loss: In  # 1
    grads: Out


# ---- layers of a transformer: operations between its matrix products ------------------------------------------------


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
    """data[sequence, head, token] is a vector with contiguous elements."""

    data: Data
    sequence_stride: Size
    head_stride: Size
    token_stride: Size


class Angles(NamedTuple):
    """cos and sin [sequence, token], each a row of ``turned`` numbers."""

    cos: Data
    sin: Data
    dtype: DTypeCode  # float32, or the dtype of the heads
    sequence_stride: Size  # 0 = all sequences have the same
    token_stride: Size


class RotaryEmbedding(NamedTuple):
    """Rotates the pairs (j, j + turned / 2) of a head's first ``turned`` columns; copies the other columns."""

    sequences: Size
    heads: Size
    length: Size
    width: Size  # columns of a head
    turned: Size  # columns that are rotated; even, at most width
    dtype: DTypeCode
    x: Heads
    angles: Angles
    backward: Flag  # the transposed rotation: x is the gradient of the result, out that of the input
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
    | PpoLossBackward
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
    "ppo_loss_backward": PpoLossBackward,
    "rms_norm": RmsNorm,
    "rms_norm_backward": RmsNormBackward,
    "gated_activation": GatedActivation,
    "gated_activation_backward": GatedActivationBackward,
    "rotary_embedding": RotaryEmbedding,
}
NAMES = {record: name for name, record in LAUNCHERS.items()}


# ---- the structures for csrc/write_records.py, and the digest of the compiled module ---------------------------------


def is_record(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "_fields")


def fields_of(record: type) -> dict[str, Any]:
    """Field name -> its C type, or the class of a nested record."""
    found = {}
    for name, annotation in typing.get_type_hints(record, include_extras=True).items():
        given = [part for part in (annotation, *typing.get_args(annotation)) if hasattr(part, "__metadata__")]
        found[name] = given[0].__metadata__[0] if given else annotation
    return found


def ranges_of(record: type) -> dict[str, Range]:
    """Field name -> its range, for the fields that declare one."""
    hints = typing.get_type_hints(record, include_extras=True)
    return {
        name: part
        for name, hint in hints.items()
        for part in getattr(hint, "__metadata__", ())
        if isinstance(part, Range)
    }


def structures() -> dict[type, dict[str, Any]]:
    """Every record with its fields; nested records come before the records that contain them."""
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
    """A digest of all fields. The compiled module fits this file if it was compiled with the same digest."""
    layout = {
        record.__name__: [(name, getattr(kind, "__name__", kind)) for name, kind in fields.items()]
        for record, fields in structures().items()
    }
    launchers = {name: record.__name__ for name, record in LAUNCHERS.items()}
    return hashlib.sha256(repr((ENUMS, layout, launchers)).encode()).hexdigest()[:16]
