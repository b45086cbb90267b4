"""Makes TRL's trainers compute their lm head with ours: patch() in a script, before the training begins.

One name leads to the head of SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer and RLOOTrainer. The functions here have
TRL's signatures and can be called without a patch too. Nothing imports TRL before ``patch`` does.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import linear_logprobs, masked_logprobs

from . import _logits
from ._patch import Patch, Replacement, Report, Step

__all__ = [
    "Report",
    "chunked_log_probs",
    "entropy_from_logits",
    "patch",
    "patched",
    "report",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "unpatch",
]

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TRAINERS = {"SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer"}


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = OUTPUTS,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``trl.kernels.ChunkedLogProbFunction.apply``: of softcap(logit_scale * (hidden weight^T + bias)) / temperature.

    Args:
        hidden: (N, H). Every row counts.
        weight: (V, H). Where its dtype is not that of hidden, it is cast to it; inside torch.autocast both are cast.
        bias: (V,) or None.
        targets: (N,), token ids.
        temperature: > 0.
        chunk_size: not used: the operation chooses the sizes of its chunks.
        final_logit_softcapping: the cap, > 0, or None.
        logit_scale: > 0.
        outputs: which of ``OUTPUTS`` to compute beside the log-probs.

    Returns:
        (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,), None where not asked for. is_top1 is
        bool and the others are float32. The first two have a gradient, as in TRL. is_top1 is true where the target is
        one of several largest logits, where TRL takes the first of them.

    Raises:
        ValueError: logit_scale is not above 0, or an argument is not as linear_logprobs expects it.
    """
    if logit_scale <= 0:
        raise ValueError(f"chunked_log_probs: logit_scale must be > 0; got {logit_scale}")
    if hasattr(weight, "ds_id"):
        # DeepSpeed ZeRO-3 empties the parameter after the forward. A view keeps the values until the backward.
        weight = weight.view_as(weight)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    options: dict[str, Any] = {
        "bias": bias,
        "temperature": temperature / logit_scale,
        "softcap": None if final_logit_softcapping is None else final_logit_softcapping / logit_scale,
    }
    asked = {name for name in OUTPUTS if name in outputs}
    if not asked:
        return linear_logprobs(hidden, weight, targets, **options), None, None, None, None
    if asked == {"entropy"}:
        return *linear_logprobs(hidden, weight, targets, **options, return_entropy=True), None, None, None
    found = linear_logprobs(hidden, weight, targets, **options, return_statistics=True)
    named = zip(OUTPUTS, (found.entropy, found.log_sum_squares, found.mean_logit, found.is_top1), strict=True)
    entropy, log_sum_sq_probs, mean_logits, is_top1 = (value if name in asked else None for name, value in named)
    return found.logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """``trl.trainer.utils.selective_log_softmax``: log softmax(logits / temperature)[index].

    Args:
        logits: (..., V).
        index: (...), or (..., K) for K log-probs a row.
        temperature: > 0.
        row_mask: like index, 0 = the result is 0.

    Returns:
        like index, float32 (float64 for float64 logits), as TRL returns it on a GPU; on a CPU it has the logits' dtype
        there.
    """
    if index.dim() < logits.dim():
        live = None if row_mask is None else row_mask != 0
        return masked_logprobs(logits, index, live, temperature=temperature)
    # The target, whose log-prob is not used, may be any.
    found = masked_logprobs(logits, index[..., 0], temperature=temperature, return_statistics=True)
    chosen = logits.gather(-1, index).to(found.logsumexp.dtype) / temperature
    logprobs = chosen - found.logsumexp.unsqueeze(-1)
    return logprobs if row_mask is None else logprobs.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """``trl.trainer.utils.entropy_from_logits``: entropy (...) in nats of logits (..., V), float32 (float64 for float64
    logits). ``chunk_size`` is not used."""
    return _logits.entropy_from_logits(logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``trl.trainer.utils.selective_log_softmax_and_entropy``: both of logits (..., V) / temperature in one pass.

    Arguments and dtype as in ``selective_log_softmax``, with index (...). Without ``entropy_requires_grad`` the entropy
    has no gradient.
    """
    live = None if row_mask is None else row_mask != 0
    logprobs, entropy = masked_logprobs(logits, index, live, temperature=temperature, return_entropy=True)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def _scores_labels_alone(device: torch.device) -> bool:
    """``trl.trainer.utils._use_triton``, where TRL asks it whether to leave positions without a label out of the head's
    products."""
    return device.type in ("cpu", "cuda", "xpu")


_UTILS = "trl.trainer.utils"
_patch = Patch(
    "trl",
    versions=("1.15", "1.16"),
    replacements=[
        Replacement(f"{_UTILS}._ChunkedLogProbFunction", chunked_log_probs, method="apply"),
        Replacement(f"{_UTILS}._use_triton", _scores_labels_alone, everywhere=False),
        Replacement(f"{_UTILS}.selective_log_softmax", selective_log_softmax),
        Replacement(f"{_UTILS}.selective_log_softmax_and_entropy", selective_log_softmax_and_entropy),
        Replacement(f"{_UTILS}.entropy_from_logits", entropy_from_logits),
    ],
    left={
        "the losses of the trainers": "made of a few numbers a token, beside the head's millions",
        "SFTTrainer with label_smoothing_factor or compute_loss_func": "TRL builds the logits for them",
        "RewardTrainer": "its loss is made of two numbers a pair, and there is no lm head",
        "DistillationTrainer": "no operation of ours has its divergence",
    },
    step=Step(
        "transformers.Trainer.training_step",
        chunked_log_probs,
        lambda trainer: not TRAINERS.isdisjoint(base.__name__ for base in type(trainer).__mro__),
    ),
)
patch, unpatch, patched, report = _patch.patch, _patch.unpatch, _patch.patched, _patch.report
