"""PPO's training data: episodes with log-probs, values, rewards and advantages, in micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_fast.config import PPOConfig
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, last_states
from rlhf_fast.ops import gae, group_advantages, linear_logprobs, masked_whiten, token_kl
from rlhf_fast.recipes.processes import Processes
from rlhf_fast.rewards.shaping import token_rewards
from rlhf_fast.rollout import EpisodeBatch

POLICY, CRITIC, REWARD, SFT = "policy", "critic", "reward", "sft"

# Largest difference between two computations of the same log-prob on the first mini-batch, in nats.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Experience:
    """One micro-batch. Tensors are (b, R) float32 if not noted, and 0 outside ``episodes.response_mask``. Only
    ``states`` has a gradient.

    ``trunk``: (b, P + R, H), the hidden states below the adapted layers, which all roles and epochs reuse; or None.
    ``states``: (b, R, H) of each of ``trained_roles`` with its autograd graph, for the first epoch; None if that epoch
    computes them itself. Without a critic, ``values`` and ``returns`` are 0.
    """

    episodes: EpisodeBatch
    trunk: torch.Tensor | None
    states: list[torch.Tensor] | None
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor  # (b,), the reward model's; 0 without one
    penalties: torch.Tensor  # (b,), the KL penalty summed over the response
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        return self.episodes.response_mask

    @property
    def kl(self) -> torch.Tensor:
        """(b,): log-ratio to the reference summed over the response (k1), in nats."""
        return token_kl(self.logprobs, self.ref_logprobs, self.mask).sum(dim=1)


def trained_roles(config: PPOConfig) -> list[str]:
    """The roles that go through the model in an update, together."""
    return [POLICY, CRITIC] if config.has_critic else [POLICY]


def response_states(
    base: SharedBase, roles: Sequence[str | None], episodes: EpisodeBatch, trunk: torch.Tensor | None
) -> list[torch.Tensor]:
    """For each role, (b, R, H): the hidden states that predict each response token."""
    found = base.hidden_of(roles, episodes.input_ids, episodes.attention_mask, trunk)
    return [episodes.before_response(states) for states in found]


@torch.no_grad()
def score(
    base: SharedBase, config: PPOConfig, episodes: EpisodeBatch, reference: str | None, *, keep_graph: bool = False
) -> Experience:
    """Log-probs of the policy before its update and of the reference, values and scores. Rewards are not set yet.

    ``keep_graph``: keeps the states of the trained roles with their graph, for training in the first epoch.
    """
    mask, trained = episodes.attention_mask, trained_roles(config)
    trunk = base.trunk(episodes.input_ids, mask)
    states: dict[str | None, torch.Tensor] = {}
    for roles in _passes(base, config, reference, keep_graph):
        with torch.set_grad_enabled(keep_graph and POLICY in roles):
            for role, found in zip(roles, base.hidden_of(roles, episodes.input_ids, mask, trunk), strict=True):
                states.setdefault(role, found)
    with torch.set_grad_enabled(keep_graph):
        before = {role: episodes.before_response(states[role]) for role in [*trained, reference]}
    logprobs = _logprobs(base, config, episodes, POLICY, before[POLICY])
    ref_logprobs = _logprobs(base, config, episodes, reference, before[reference])
    values = nothing = torch.zeros_like(logprobs)
    if CRITIC in trained:
        values = torch.where(episodes.response_mask, base.heads[CRITIC](before[CRITIC]), 0.0)
    if REWARD in base.roles:
        scores = base.heads[REWARD](last_states(states[REWARD], mask))
    else:
        scores = torch.zeros(len(episodes.responses), device=base.device)
    kept = [before[role] for role in trained] if keep_graph else None
    return Experience(
        episodes, trunk, kept, logprobs, ref_logprobs, values, scores, scores, nothing, nothing, nothing
    )  # fmt: skip


def _passes(base: SharedBase, config: PPOConfig, reference: str | None, keep_graph: bool) -> list[list[str | None]]:
    """The roles that score, by pass through the model.

    Policy and reference each share a pass with as many roles as the policy does in the update: a product of another
    shape rounds differently, so that the first ratio of an update would not be exactly 1, nor the first KL exactly 0.
    """
    reward: list[str | None] = [REWARD] if REWARD in base.roles else []
    if not config.has_critic:
        return [[role] for role in [POLICY, reference, *reward]]
    if not keep_graph:
        return [[POLICY, reference], [CRITIC, *reward]]
    return [[POLICY, CRITIC], [reference, *(reward or ([reference] if base.one_pass else []))]]


def _logprobs(
    base: SharedBase, config: PPOConfig, episodes: EpisodeBatch, role: str | None, states: torch.Tensor
) -> torch.Tensor:
    """(b, R) of the response tokens, from the states (b, R, H) that predict them."""
    vocabulary = base.vocabulary_of(role)
    return linear_logprobs(
        states,
        vocabulary.weight,
        episodes.targets,
        episodes.response_mask,
        vocab_size=base.vocab_size,
        **vocabulary.options(config.temperature),
    )


def set_rewards(
    experiences: Sequence[Experience],
    scores: torch.Tensor,
    config: PPOConfig,
    *,
    kl_coef: float,
    group: torch.distributed.ProcessGroup | None,
) -> None:
    """Sets the rewards. ``scores``: one per episode, in order. Whitening is over the whole rollout, and with ``group``
    over that of all processes."""
    for experience, part in zip(experiences, scores.split([len(e.scores) for e in experiences]), strict=True):
        kl = token_kl(experience.logprobs, experience.ref_logprobs, experience.mask, estimator=config.kl_estimator)
        experience.penalties = -kl_coef * kl.sum(dim=1)
        experience.rewards = token_rewards(kl, part, experience.mask, kl_coef=kl_coef)
    if config.whiten_rewards:
        rewards = _whiten(experiences, [e.rewards for e in experiences], group, shift_mean=False)
        for experience, whitened in zip(experiences, rewards, strict=True):
            experience.rewards = whitened


def set_advantages(
    experiences: Sequence[Experience], config: PPOConfig, *, group: torch.distributed.ProcessGroup | None
) -> None:
    """Sets returns and advantages; the advantages are whitened over the same tokens as in ``set_rewards``."""
    for experience in experiences:
        experience.advantages, experience.returns = gae(
            experience.rewards, experience.values, experience.mask, gamma=config.gamma, lam=config.lam
        )
    advantages = _whiten(experiences, [e.advantages for e in experiences], group, shift_mean=True)
    for experience, whitened in zip(experiences, advantages, strict=True):
        experience.advantages = whitened


def set_group_advantages(experiences: Sequence[Experience], config: PPOConfig, processes: Processes) -> None:
    """Sets the advantages without a critic. Every token of a response gets its response's, from the sum of its rewards.

    Every ``num_generations`` episodes in order are the responses to one prompt.
    """
    own = torch.cat([experience.rewards.sum(dim=1) for experience in experiences])
    rewards = torch.tensor(processes.gather(own.view(-1, config.num_generations).tolist()), device=own.device)
    found = group_advantages(rewards.flatten(), config.num_generations, estimator=config.advantage_estimator)
    advantages = torch.tensor(processes.share(found.view_as(rewards).tolist()), device=own.device).flatten()
    for experience, part in zip(experiences, advantages.split([len(e.scores) for e in experiences]), strict=True):
        experience.advantages = torch.where(experience.mask, part[:, None], 0.0)


def _whiten(
    experiences: Sequence[Experience],
    tensors: Sequence[torch.Tensor],
    group: torch.distributed.ProcessGroup | None,
    *,
    shift_mean: bool,
) -> list[torch.Tensor]:
    masks = [experience.mask for experience in experiences]
    live = torch.cat([tensor[mask] for tensor, mask in zip(tensors, masks, strict=True)])
    pieces = masked_whiten(live, shift_mean=shift_mean, group=group).split([int(mask.sum()) for mask in masks])
    whitened = []
    for tensor, mask, piece in zip(tensors, masks, pieces, strict=True):
        filled = torch.zeros_like(tensor)
        filled[mask] = piece
        whitened.append(filled)
    return whitened


def check_start(experiences: Sequence[Experience], dtype: torch.dtype) -> None:
    """Raises UserError if the KL to the reference is not 0 before the first update, when the policy is the SFT model.

    Such a defect: trl issue 495, where the reference was the base without the SFT adapter.
    """
    gap = torch.stack([((e.logprobs - e.ref_logprobs).abs() * e.mask).max() for e in experiences]).max().item()
    if not gap <= TOLERANCE[dtype]:
        raise UserError(
            f"ppo: before the first update the policy's log-probs lie up to {gap:.3g} nats from the reference's, which "
            f"must be the same model (tolerance for {dtype}: {TOLERANCE[dtype]}). Look at --sft_adapter (is it the "
            "adapter that SFT made on this base?), and at dropout or padding in the model's code"
        )


def check_first_ratio(parts: Sequence[dict[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Raises UserError if a ratio is not 1 on the first mini-batch of an update, before the policy has changed.

    ``parts``: the mini-batch's statistics, in which approx_kl is half the mean square of the log ratio.
    """
    gap = (2 * torch.stack([part["approx_kl"] for part in parts]).sum()).sqrt().item()
    if not gap <= TOLERANCE[dtype]:
        raise UserError(
            f"ppo: on the first mini-batch the log ratio is {gap:.3g} (root mean square) and must be 0 (tolerance for "
            f"{dtype}: {TOLERANCE[dtype]}): scoring and training disagree. Look at dropout, padding or position ids in "
            "the model's code, at --dtype, and at --attn_implementation"
        )
