"""PPO: roll out, score, advantages, update. Policy, reference, critic and reward model are adapters on one base.

With an estimator of advantages other than gae there is no critic.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch

from rlhf_fast import metrics
from rlhf_fast.config import PPOConfig
from rlhf_fast.data import PromptRow, batch_indices, epoch_order, prompt_rows
from rlhf_fast.errors import UserError
from rlhf_fast.metrics import Metric
from rlhf_fast.models import adapters
from rlhf_fast.ops import clipped_value_loss, linear_policy_loss
from rlhf_fast.recipes import critic, judging, ppo_report
from rlhf_fast.recipes.experience import (
    CRITIC,
    POLICY,
    REWARD,
    SFT,
    Experience,
    check_first_ratio,
    check_start,
    response_states,
    score,
    set_advantages,
    set_group_advantages,
    set_rewards,
    trained_roles,
)
from rlhf_fast.recipes.heap import give_back_memory
from rlhf_fast.recipes.memory import MICRO_BATCH, memory_for, response_lengths, sampling_lengths
from rlhf_fast.recipes.rows import load_rows
from rlhf_fast.recipes.stage import Stage
from rlhf_fast.rewards import Functions, KLController, RunningMoments, apply_missing_eos
from rlhf_fast.rollout import Response, choose_engine, collate_episodes, generate

MEMORY = (*MICRO_BATCH, "batch_size", "max_length")  # settings that reduce memory, in the order in which to lower them
# The statistics of an update; those of the value loss are there with a critic only.
STATISTICS = {
    "policy": metrics.POLICY_LOSS,
    "entropy": metrics.TOKEN_ENTROPY,
    "ratio": metrics.RATIO,
    "approx_kl": metrics.APPROX_KL,
    "clip_fraction": metrics.CLIP_FRACTION,
    "value": metrics.VALUE_LOSS,
    "value_clip_fraction": metrics.VALUE_CLIP_FRACTION,
    "grad_norm": metrics.GRAD_NORM,
}


def train(config: PPOConfig, resume_from_checkpoint: str | None = None) -> dict[str, Any]:
    """Runs the stage; ``output_dir/policy`` and, with a critic, ``output_dir/critic`` have the final adapters.

    Returns the figures of ``summary.json``. ``resume_from_checkpoint`` overrides the config's ("auto" or a folder).
    """
    rewarders = Functions(config.reward_functions, weights=config.reward_weights, timeout=config.reward_timeout)
    scorers = Functions(config.eval_functions, timeout=config.reward_timeout)
    stage = Stage("ppo", config, resume_from_checkpoint)
    if config.ignore_eos:
        stage.base.stop_ids = []
    prompts, held_out = load_rows(stage, prompt_rows, config.max_length - config.response_length)
    held_out = held_out[: config.eval_prompts]
    stage.check_lengths(sampling_lengths([*prompts, *held_out], config.response_length))
    for rows in (prompts, held_out):
        judging.check_columns(rows, rewarders, scorers)
    reference = add_roles(stage)
    choose_engine(stage.base, config.rollout_engine)  # raises an error before the run begins
    prompts_a_step = config.batch_size // config.num_generations
    total = config.max_steps or math.ceil(len(prompts) * config.num_train_epochs / prompts_a_step)
    controller = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
    fresh = {
        "kl_coef": config.kl_coef,
        "kl_history": [],
        "baseline": {},
        "latest": {},
        "moments": asdict(RunningMoments()),
    }
    stage.start(trained_roles(config), total, values=fresh)
    critic.restore(stage)

    if stage.values["baseline"] and len(stage.values["baseline"]["scores"]) != len(held_out):
        raise UserError(
            f"this run was begun with {len(stage.values['baseline']['scores'])} held-out prompts and now has "
            f"{len(held_out)}; resume with the config that began it"
        )
    if not stage.values["baseline"] and held_out:
        ppo_report.evaluate(stage, held_out, rewarders, scorers, step=0)
    evaluated = False
    with stage:
        for step in stage.steps():
            batch = [prompts[i] for i in batch_indices(len(prompts), prompts_a_step, step - 1, config.seed)]
            clock = [time.perf_counter()]

            responses = roll_out(stage, stage.share(batch))
            clock.append(time.perf_counter())

            give_back_memory()  # memory of the merged copy
            parts = micro_batches(stage, responses)
            # only for a single micro-batch: the graphs of several would be in memory at once
            experiences = [scored(stage, part, reference, keep_graph=len(parts) == 1) for part in parts]
            if step == 1:
                check_start(experiences, stage.base.dtype)
            judged = judging.judge(stage, rewarders, responses, epoch=(step - 1) * prompts_a_step / len(prompts))
            scores = total_scores(config, experiences, rewarders.weighted(judged.each, len(responses)))
            moments = RunningMoments(**stage.values["moments"])
            if config.scale_scores:
                moments.update(torch.tensor(stage.gather(scores.tolist())))
                scores = scores / moments.std
            kl_coef = controller.kl_coef = stage.values["kl_coef"]
            set_rewards(experiences, scores, config, kl_coef=kl_coef, group=stage.group)
            if step == 1 and {CRITIC, REWARD} <= set(stage.base.roles):
                critic.fit(stage, experiences)
            if config.has_critic:
                set_advantages(experiences, config, group=stage.group)
            else:
                set_group_advantages(experiences, config, stage)
            clock.append(time.perf_counter())

            statistics = update(stage, experiences, step)
            clock.append(time.perf_counter())

            values = ppo_report.rollout_metrics(stage, experiences, scores, kl_coef) | statistics
            gold = judging.judge(stage, scorers, responses)
            values |= judging.metrics(stage, judged, gold, model=REWARD in stage.base.roles)
            values |= ppo_report.phase_seconds(clock)
            logged = judging.logged(stage, (judged, gold), values)
            controller.update(values[metrics.KL], config.batch_size)
            stage.values.update(kl_coef=controller.kl_coef, moments=asdict(moments))
            stage.values["kl_history"].append(values[metrics.KL])
            ppo_report.log_step(stage, step, values, logged, responses, experiences, scores, judged.view.extras)
            evaluated = bool(held_out) and stage.evaluation_due(step, times=1)
            if evaluated:
                ppo_report.evaluate(stage, held_out, rewarders, scorers, step=step)
        if held_out and stage.stopped_early and not evaluated:
            ppo_report.evaluate(stage, held_out, rewarders, scorers, step=stage.step)

    return ppo_report.finish(stage, scorers)


def add_roles(stage: Stage[PPOConfig]) -> str | None:
    """Adds policy, critic (with gae alone) and reward model to the base; returns the role of the reference.

    The policy starts as the SFT model. The critic starts as the reward model, if there is one, and is fitted to the
    first rollout (``critic.fit``).
    """
    config = stage.config
    reference = None
    if config.sft_adapter is not None:
        adapters.load_role(stage.base, SFT, config.sft_adapter)
        reference = SFT
    if config.reward_adapter is not None:
        adapters.load_role(stage.base, REWARD, config.reward_adapter, want_head=True)
    stage.base.add_role(POLICY, copy_of=reference)
    if config.has_critic:
        stage.base.add_role(CRITIC, copy_of=REWARD if config.reward_adapter is not None else reference, head=True)
    prompts = config.batch_size // config.num_generations
    own = prompts // stage.accelerator.num_processes * config.num_generations
    if config.micro_batch_size is not None:
        check_mini_batches(stage, math.ceil(own / config.micro_batch_size))
    return reference


def micro_batches(stage: Stage[PPOConfig], responses: Sequence[Response]) -> list[Sequence[Response]]:
    parts = stage.micro_batches(responses, response_lengths(responses))
    check_mini_batches(stage, len(parts))
    return parts


def check_mini_batches(stage: Stage[PPOConfig], micro_batches: int) -> None:
    """Raises UserError if there are fewer micro-batches than optimizer steps."""
    config = stage.config
    if micro_batches < config.num_mini_batches:
        setting = "micro_batch_size" if config.micro_batch_tokens is None else "micro_batch_tokens"
        raise UserError(
            f"--num_mini_batches {config.num_mini_batches} needs as many micro-batches; --batch_size "
            f"{config.batch_size} over {stage.accelerator.num_processes} processes makes {micro_batches} of "
            f"--{setting} {getattr(config, setting)}: lower that one"
        )


def roll_out(stage: Stage[PPOConfig], prompts: Sequence[PromptRow]) -> list[Response]:
    """``num_generations`` responses to each prompt; those to one prompt stand together."""
    config = stage.config
    rows = [row for row in prompts for _ in range(config.num_generations)]
    lengths = sampling_lengths(rows, config.response_length)[-config.rollout_batch_size :]
    with memory_for(stage, "rollout", lengths, "rollout_batch_size", "response_length", "max_length"):
        return generate(
            stage.base,
            POLICY,
            rows,
            response_length=config.response_length,
            temperature=config.temperature,
            batch_size=config.rollout_batch_size,
            engine=config.rollout_engine,
            skip_special_tokens=config.reward_skip_special_tokens,
        )


def scored(
    stage: Stage[PPOConfig], responses: Sequence[Response], reference: str | None, *, keep_graph: bool = False
) -> Experience:
    """One micro-batch of responses with log-probs, values and scores."""
    with memory_for(stage, "scoring", response_lengths(responses), *MEMORY):
        episodes = collate_episodes(responses, stage.base.pad_id, stage.base.device)
        return score(stage.base, stage.config, episodes, reference, keep_graph=keep_graph)


def total_scores(config: PPOConfig, experiences: Sequence[Experience], rewards: Sequence[float]) -> torch.Tensor:
    """(B,): scores of the reward model plus ``rewards``, the functions' weighted sums, after the missing-EOS rule."""
    model_scores = torch.cat([experience.scores for experience in experiences])
    scores = model_scores + torch.tensor(rewards, device=model_scores.device)
    stopped = torch.cat([experience.episodes.stopped for experience in experiences])
    return apply_missing_eos(scores, stopped, penalty=config.missing_eos_penalty, fixed_score=config.missing_eos_score)


def update(stage: Stage[PPOConfig], experiences: Sequence[Experience], step: int) -> dict[Metric, float]:
    """Trains num_ppo_epochs passes over the rollout. Micro-batches keep their rows, so that in the first pass scoring
    and training have the same shapes and the ratio is exactly 1. Later passes shuffle the micro-batches."""
    config = stage.config
    records: list[dict[str, float]] = []
    for epoch in range(config.num_ppo_epochs):
        count = len(experiences)
        order = list(range(count)) if epoch == 0 else epoch_order(count, config.seed + step, epoch)
        bounds = [round(i * count / config.num_mini_batches) for i in range(config.num_mini_batches + 1)]
        for start, end in pairwise(bounds):
            mini_batch = [experiences[i] for i in order[start:end]]
            own_tokens = torch.stack([experience.mask.sum() for experience in mini_batch]).sum()
            tokens = stage.accelerator.reduce(own_tokens, reduction="sum")
            parts = []
            for experience in mini_batch:
                with memory_for(stage, "update", response_lengths(experience.episodes.responses), *MEMORY):
                    parts.append(losses(stage, experience, tokens))
            if not records:
                check_first_ratio(parts, stage.base.dtype)
            record = stage.sum({name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]})
            loss = record["policy"] + config.value_coef * record.get("value", 0.0)
            rows = [response.row.index for experience in mini_batch for response in experience.episodes.responses]
            records.append(record | {"grad_norm": stage.update(loss, rows)})
    mean = {name: sum(record[name] for record in records) / len(records) for name in records[0]}
    variance = sum((record["ratio"] - mean["ratio"]) ** 2 for record in records) / len(records)
    found = {metric: mean[name] for name, metric in STATISTICS.items() if name in mean}
    return found | {metrics.RATIO_VAR: variance}


def losses(stage: Stage[PPOConfig], experience: Experience, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Accumulates one micro-batch's gradients. Returns its part of the mini-batch's statistics; the statistics are the
    sum of these parts.

    ``tokens``: the number of the mini-batch's live response tokens over all processes.
    """
    config = stage.config
    episodes, vocabulary = experience.episodes, stage.base.vocabulary_of(POLICY)
    states, experience.states = experience.states, None
    if states is None:
        states = response_states(stage.base, trained_roles(config), episodes, experience.trunk)
    policy_states, *critic_states = states
    policy = linear_policy_loss(
        policy_states,
        vocabulary.weight,
        episodes.targets,
        experience.logprobs,
        experience.advantages,
        experience.mask,
        entropy_coef=config.entropy_coef,
        vocab_size=stage.base.vocab_size,
        **vocabulary.options(config.temperature),
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        num_items=tokens,
    )
    loss, share = policy.loss, experience.mask.sum() / tokens
    statistics = {
        "policy": policy.policy_loss,
        "entropy": policy.entropy,
        "ratio": policy.ratio_mean * share,
        "approx_kl": policy.approx_kl * share,
        "clip_fraction": policy.clip_fraction * share,
    }
    if critic_states:
        value = clipped_value_loss(
            stage.base.heads[CRITIC](critic_states[0]),
            experience.values,
            experience.returns,
            experience.mask,
            clip=config.value_clip,
            num_items=tokens,
        )
        loss = loss + config.value_coef * value.loss
        statistics |= {"value": value.loss.detach(), "value_clip_fraction": value.clip_fraction * share}
    stage.backward(loss)
    return statistics
