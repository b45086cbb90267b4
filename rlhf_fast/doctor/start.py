"""Checks of a stage's model before its first step: what must be equal is computed twice and compared."""

from collections.abc import Sequence

import torch

from rlhf_fast.config import DPOConfig, PPOConfig
from rlhf_fast.data import PairRow
from rlhf_fast.doctor.findings import Check, Finding, error, note, ok
from rlhf_fast.doctor.subject import OpenStage
from rlhf_fast.doctor.tokens import answer_end
from rlhf_fast.models import SharedBase
from rlhf_fast.recipes import dpo, ppo
from rlhf_fast.recipes.experience import (
    REWARD,
    TOLERANCE,
    check_first_ratio,
    check_start,
    set_advantages,
    set_rewards,
)

# Largest differences of scores and of mean log-probs between batches of other shapes, whose products round differently.
CLOSE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
BROKEN = "Look at dropout, padding and position ids in the model's code, and at --attn_implementation."


def base_model(opened: OpenStage) -> Finding:
    """The model that was opened, and what was found surprising about it."""
    base = opened.base
    roles = ", ".join(base.roles)
    found = f"{type(base.model).__name__} in {str(base.dtype).removeprefix('torch.')} on {base.device}; roles: {roles}"
    if opened.stand_ins:
        found += f"; random in place of adapters that the run makes first: {', '.join(opened.stand_ins)}"
    if base.notes:
        why = "The run says these too; each may be meant."
        return note(f"{found}. {'; '.join(base.notes)}", why, "Nothing, if they are meant.")
    return ok(found)


@torch.no_grad()
def dropout(opened: OpenStage) -> Finding:
    """Whether two passes over the same tokens agree bit for bit, in every role."""
    base = opened.base
    mask = torch.ones_like(base.probe)
    loud = [name for name, module in base.model.named_modules() if module.training]
    differing = []
    for role in [None, *base.roles]:
        first, second = (base.hidden(role, base.probe, mask) for _ in range(2))
        if not torch.equal(first, second):
            differing.append(role or "the base")
    why = "With dropout the first ratio is not 1, the first KL is not 0, and scores of the same text differ."
    if loud or differing:
        which = f"modules in training mode: {', '.join(loud[:3])}" if loud else "every module is in eval mode"
        return error(
            f"two passes over the same tokens differ for {', '.join(differing) or 'no role'}; {which}", why, BROKEN
        )
    found = f"two passes over the same tokens agree in every role ({', '.join(['the base', *base.roles])})"
    if opened.config.lora_dropout > 0 and not isinstance(opened.config, PPOConfig):
        return ok(f"{found}; --lora_dropout {opened.config.lora_dropout:g} is on in updates alone")
    return ok(found)


@torch.no_grad()
def reward_padding(opened: OpenStage) -> Finding | None:
    """Scores of rows alone, padded on the right, padded on the left, and beside other rows."""
    if REWARD not in opened.base.roles:
        return None
    rows = [row.chosen_ids if isinstance(row, PairRow) else row.input_ids for row in opened.spread]
    base = opened.base
    alone = torch.cat([scores(base, [row], "right") for row in rows])
    together = {side: scores(base, rows, side) for side in ("right", "left")}
    gaps = {side: (found - alone).abs().max().item() for side, found in together.items()}
    found = (
        f"scores of {len(rows)} rows of {min(map(len, rows))} to {max(map(len, rows))} tokens, alone and in one batch, "
        f"differ by {gaps['right']:.2g} with padding on the right and {gaps['left']:.2g} on the left"
    )
    if max(gaps.values()) <= CLOSE[base.dtype] * max(1.0, alone.abs().max().item()):
        return ok(found)
    return error(found, "A score must not depend on the other rows of its batch, nor on padding.", BROKEN)


def scores(base: SharedBase, rows: Sequence[list[int]], side: str) -> torch.Tensor:
    longest = max(map(len, rows))

    def padded(values: list[int], fill: int) -> list[int]:
        pads = [fill] * (longest - len(values))
        return values + pads if side == "right" else pads + values

    ids = torch.tensor([padded(row, base.pad_id) for row in rows], device=base.device)
    mask = torch.tensor([padded([1] * len(row), 0) for row in rows], device=base.device)
    return base.scores(REWARD, ids, mask)


@torch.no_grad()
def left_padding(opened: OpenStage) -> Finding | None:
    """Log-probs of responses after prompts that are padded on the left, and alone."""
    if not isinstance(opened.config, PPOConfig):
        return None
    together = ppo.scored(opened.stage, opened.responses, opened.reference)
    gaps = []
    for place, response in enumerate(opened.responses):
        alone = ppo.scored(opened.stage, [response], opened.reference)
        length = len(response.token_ids)
        gaps.append((alone.logprobs[0, :length] - together.logprobs[place, :length]).abs())
    gap = torch.cat(gaps).mean().item()
    prompts = [len(response.row.input_ids) for response in opened.responses]
    found = (
        f"log-probs of responses to prompts of {min(prompts)} to {max(prompts)} tokens, alone and padded on the left "
        f"to one batch, differ by {gap:.2g} nats a token"
    )
    if gap <= CLOSE[opened.base.dtype]:
        return ok(found)
    why = "Positions are counted from the padding: a prompt means something else in every batch."
    return error(found, why, BROKEN)


@torch.no_grad()
def sampling(opened: OpenStage) -> Finding | None:
    """Log-probs with which tokens were sampled, and those that scoring computes for the same tokens."""
    if not isinstance(opened.config, PPOConfig):
        return None
    experience = ppo.scored(opened.stage, opened.responses, opened.reference)
    gaps = (experience.logprobs - experience.episodes.sampled_logprobs).abs()[experience.mask]
    gap, tokens = gaps.mean().item(), len(gaps)
    found = (
        f"log-probs of {tokens} sampled tokens at temperature {opened.config.temperature:g}, at sampling and at "
        f"scoring, differ by {gap:.2g} nats a token"
    )
    if gap <= CLOSE[opened.base.dtype]:
        return ok(found)
    why = "The distribution that is sampled must be the one that is trained, or the policy gradient is of another one."
    return error(found, why, f"Try --rollout_engine transformers. {BROKEN}")


def start_kl(opened: OpenStage) -> Finding | None:
    """The policy starts as the reference: KL 0, and with DPO rewards of 0."""
    tolerance = TOLERANCE[opened.base.dtype]
    if isinstance(opened.config, DPOConfig):
        with torch.no_grad():
            outcome, _ = dpo.pair_losses(opened.base, opened.config, opened.spread, opened.reference)
        gap = torch.stack([outcome.chosen_rewards, outcome.rejected_rewards]).abs().max().item()
        found = f"rewards of {len(opened.spread)} pairs before the first step are at most {gap:.2g} in size"
        why = "Rewards are log-ratios to the reference, from which the policy starts."
        return ok(found) if gap <= tolerance else error(found, why, "Look at --sft_adapter, dropout and padding.")
    if not isinstance(opened.config, PPOConfig):
        return None
    experience = ppo.scored(opened.stage, opened.responses, opened.reference)
    check_start([experience], opened.base.dtype)
    return ok(
        f"KL to the reference before the first update: {experience.kl.abs().max().item():.2g} nats at most, over "
        f"{len(opened.responses)} responses"
    )


def start_ratio(opened: OpenStage) -> Finding | None:
    """The ratio of the first mini-batch is 1: scoring and training compute the same log-probs."""
    if not isinstance(opened.config, PPOConfig):
        return None
    experience = ppo.scored(opened.stage, opened.responses, opened.reference)
    set_rewards([experience], experience.scores, opened.config, kl_coef=opened.config.kl_coef, group=None)
    set_advantages([experience], opened.config, group=None)  # without a critic its values are 0
    parts = [ppo.losses(opened.stage, experience, experience.mask.sum())]
    check_first_ratio(parts, opened.base.dtype)
    ratio = parts[0]["ratio"].item()
    return ok(f"mean ratio of the first mini-batch: {ratio:.6f}, over {int(experience.mask.sum())} tokens")


CHECKS: list[Check] = [
    base_model,
    answer_end,
    dropout,
    reward_padding,
    left_padding,
    sampling,
    start_kl,
    start_ratio,
]
