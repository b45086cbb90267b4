"""gae on fused kernels: one pass over each sequence, and the whitening of all."""

import torch
from torch import Tensor

from .._dispatch import implements
from .._launch import launch
from ..gae import check_bounds
from ._op import fused_op


def _kernel(
    rewards: Tensor,
    values: Tensor,
    live: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    """(B, T) without cu_seqlens, (N,) with -> (advantages, returns)."""
    if cu_seqlens is None:
        sequences, length = rewards.shape
    else:
        if not cu_seqlens.is_cuda:  # where asking would synchronise, and the kernels keep within the tokens
            check_bounds(cu_seqlens, rewards.shape[0])
        sequences, length = cu_seqlens.shape[0] - 1, rewards.shape[0]
    advantages, returns = rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
    launch(
        "gae",
        sequences,
        length,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        rewards.contiguous(),
        values.contiguous(),
        None if live is None else live.contiguous(),
        gamma,
        lam,
        whiten,
        advantages,
        returns,
        torch.get_num_threads(),
    )
    return advantages, returns


def _fake(rewards: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


implements("gae", "native", "triton", "cuda")(fused_op("gae", _kernel, _fake))
