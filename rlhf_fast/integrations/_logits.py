"""What several trainers ask of logits alone."""

from torch import Tensor

from rlhf_fast.ops import masked_logprobs


def entropy_from_logits(logits: Tensor) -> Tensor:
    """The entropy in nats of each row of ``logits`` (..., V): (...), float32 (float64 for float64 logits)."""
    # with the most probable token as the target, a confident row keeps the digits of its small entropy
    return masked_logprobs(logits, logits.detach().argmax(-1), return_entropy=True)[1]
