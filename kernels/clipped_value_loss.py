"""PPO's clipped value loss: ppo_loss without a policy."""

import math

from torch import Tensor

from .ppo_loss import ppo_loss


def clipped_value_loss(
    sequences: int,
    length: int,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    live: Tensor | None,
    clip: float,
    aggregation: int,
    num_items: float | Tensor,
    loss: Tensor,
    statistics: Tensor,
    grad: Tensor | None,
    threads: int,
) -> None:
    ppo_loss(
        sequences, length, None, None, None, values, old_values, returns, None, None, live, 0.0, 0.0, math.inf, clip,
        1.0, 0.0, 0.0, 0, 0, aggregation, num_items, loss, statistics, None, grad, None, threads,
    )  # fmt: skip
