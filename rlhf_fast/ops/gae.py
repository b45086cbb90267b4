"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438)."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

from . import _checks
from ._aggregate import upcast
from ._dispatch import implementation, implements, launch
from ._op import empty_contiguous, fused_op
from .masked_whiten import masked_whiten


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every live token.

    Over the live tokens of a sequence, in order: delta_t = rewards_t + gamma * values_{t+1} - values_t and
    advantages_t = delta_t + gamma * lam * advantages_{t+1}, both 0 past the last live token. A masked token is
    skipped: it adds no reward and does not break the trace, so the "next" token is the next live one, wherever it is.

    There is no bootstrapping: the value after the last live token is 0, also for a response that was cut at its length
    limit. To bootstrap such a response, add gamma * the value of its next state to its last reward.

    Args:
        rewards: (B, T), or (N,) with ``cu_seqlens``; float.
        values: same shape; the critic's value of the state in which each token was chosen.
        mask: same shape, bool or 0/1, 1 = counts. Masked tokens are not read.
            A value other than 0 and 1 is an error on the CPU; on a GPU it is not checked and counts as 1.
        gamma: discount per token, in [0, 1].
        lam: the lambda of GAE, in [0, 1].
        cu_seqlens: (B + 1,) integers, the bounds of packed sequences: 0 first, N last, never decreasing; sequence b
            is tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1. Other values are an error on the CPU; on a GPU, where
            reading them would synchronise, they make all results NaN (masked advantages are 0 after whitening).
        whiten: scale the advantages to mean 0 and variance 1 over all live tokens of this call. (To whiten across
            ranks, call ``masked_whiten`` with its ``group``.) Returns use the advantages before whitening.

    Returns:
        ``(advantages, returns)``, shape of ``rewards``, 0 at masked tokens; float32, or float64 when an input is.
        Both are targets: no gradient flows through them. returns = advantages + values.
        NaN in a live token makes the live tokens before it in its sequence NaN and, without whitening, no others.

    Raises:
        TypeError: an input is not a tensor of the dtype above.
        ValueError: shapes or devices differ, or are not as above; gamma or lam outside [0, 1]; bad ``cu_seqlens``.
    """
    _checks.alike("gae", "that of rewards", rewards=rewards, values=values)
    if rewards.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(
            "gae: rewards must be (B, T), or packed (N,) together with cu_seqlens; "
            f"got shape {tuple(rewards.shape)} {'without' if cu_seqlens is None else 'with'} cu_seqlens"
        )
    _checks.within("gae", 0, 1, gamma=gamma, lam=lam)
    if cu_seqlens is not None:
        _checks.same_device("gae", rewards=rewards, values=values, cu_seqlens=cu_seqlens)
        _checks.integral("gae", cu_seqlens=cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"gae: cu_seqlens must have shape (B + 1,); got {tuple(cu_seqlens.shape)}")
        cu_seqlens = cu_seqlens.to(torch.int64)
    live = _checks.live_mask("gae", mask, rewards.shape, rewards.device)

    rewards, values = upcast(_checks.constant(rewards), _checks.constant(values))
    return implementation("gae", rewards)(Inputs(rewards, values, live, cu_seqlens, gamma, lam, whiten))


class Inputs(NamedTuple):
    rewards: Tensor  # (B, T) without cu_seqlens (int64), (N,) with; one dtype
    values: Tensor
    live: Tensor | None
    cu_seqlens: Tensor | None
    gamma: float
    lam: float
    whiten: bool


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Checks cu_seqlens on the CPU, where wrong bounds would make the kernels access memory past the tokens.

    Called inside the custom op, so that a compiled graph checks too.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(
            f"gae: cu_seqlens must start at 0, never decrease and end at the number of tokens, {tokens}; got {bounds}"
        )


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("gae", "torch")
def _torch(inputs: Inputs) -> tuple[Tensor, Tensor]:
    advantages, returns = _loop(*inputs[:-1])
    return (masked_whiten(advantages, inputs.live) if inputs.whiten else advantages), returns


# A custom op, because torch.compile would unroll the loop over time into its graph.
@torch.library.custom_op("rlhf_fast::gae_torch", mutates_args=())
def _loop(
    rewards: Tensor,
    values: Tensor,
    live: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    if live is None:
        live = torch.ones_like(rewards, dtype=torch.bool)
    if cu_seqlens is None:
        return _padded(rewards, values, live, gamma, lam)
    if cu_seqlens.device.type == "cpu":
        check_bounds(cu_seqlens, rewards.shape[0])
    if rewards.shape[0] == 0:  # lengths may be empty, and lengths.max() below would raise
        return torch.zeros_like(rewards), torch.zeros_like(values)

    lengths = cu_seqlens.diff()
    token = torch.arange(rewards.shape[0], device=rewards.device)
    row = torch.repeat_interleave(
        torch.arange(lengths.shape[0], device=rewards.device), lengths, output_size=rewards.shape[0]
    )
    column = token - cu_seqlens[row]

    def unpack(packed: Tensor) -> Tensor:
        # int(lengths.max()) is the only GPU synchronisation of this reference
        padded = packed.new_zeros(lengths.shape[0], int(lengths.max()))
        padded[row, column] = packed
        return padded

    advantages, returns = _padded(unpack(rewards), unpack(values), unpack(live), gamma, lam)
    return advantages[row, column], returns[row, column]


@torch.library.register_fake("rlhf_fast::gae_torch")
def _(
    rewards: Tensor,
    values: Tensor,
    live: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


def _padded(rewards: Tensor, values: Tensor, live: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages = rewards.new_zeros(rewards.shape)
    next_value = rewards.new_zeros(rewards.shape[0])
    next_advantage = next_value
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(live[:, t], advantage, 0.0)
        next_advantage = torch.where(live[:, t], advantage, next_advantage)
        next_value = torch.where(live[:, t], values[:, t], next_value)
    return advantages, torch.where(live, advantages + values, 0.0)


# ---- on the engines: one pass over each sequence, then whitening over all of them -----------------------------------


def _kernel(inputs: Inputs) -> tuple[Tensor, Tensor]:
    rewards, cu_seqlens, live = inputs.rewards, inputs.cu_seqlens, inputs.live
    if cu_seqlens is None:
        sequences, length = rewards.shape
    else:
        if not cu_seqlens.is_cuda:  # on a GPU the check would synchronise: the kernels check instead
            check_bounds(cu_seqlens, rewards.shape[0])
        sequences, length = cu_seqlens.shape[0] - 1, rewards.shape[0]
    advantages, returns = _outputs(inputs)
    launch(
        records.Gae(
            sequences=sequences,
            length=length,
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
            rewards=rewards.contiguous(),
            values=inputs.values.contiguous(),
            live=None if live is None else live.contiguous(),
            gamma=inputs.gamma,
            lam=inputs.lam,
            whiten=inputs.whiten,
            advantages=advantages,
            returns=returns,
        ),
        rewards,
    )
    return advantages, returns


def _outputs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return empty_contiguous(inputs.rewards), empty_contiguous(inputs.rewards)


implements("gae", "fused")(fused_op("gae", Inputs, _kernel, _outputs))
