"""PPO's output: metrics of a rollout, held-out evaluations against the SFT model, samples, the final table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from rlhf_fast import metrics
from rlhf_fast.config import PPOConfig
from rlhf_fast.data import PromptRow
from rlhf_fast.metrics import Metric
from rlhf_fast.recipes.diversity import distinct_2, repetition, similarity
from rlhf_fast.recipes.experience import POLICY, REWARD, Experience, trained_roles
from rlhf_fast.recipes.judging import judge, mean, present
from rlhf_fast.recipes.memory import MICRO_BATCH, memory_for, response_lengths, sampling_lengths
from rlhf_fast.recipes.ppo_samples import sample, train_samples
from rlhf_fast.recipes.stage import Stage, seeded
from rlhf_fast.rewards import Functions, Numbers
from rlhf_fast.rollout import Response, collate_episodes, generate

RESAMPLES = 10_000


def rollout_metrics(
    stage: Stage[PPOConfig], experiences: Sequence[Experience], scores: torch.Tensor, kl_coef: float
) -> dict[Metric, float]:
    """Means over the episodes of all processes."""
    config = stage.config
    responses = [response for experience in experiences for response in experience.episodes.responses]
    lengths = torch.cat([experience.mask.sum(dim=1) for experience in experiences])
    kl = torch.cat([experience.kl for experience in experiences])
    samples = config.num_generations
    groups = scores.view(-1, samples)
    model = torch.cat([experience.scores for experience in experiences])
    gaps = torch.cat([(e.logprobs - e.episodes.sampled_logprobs).abs()[e.mask] for e in experiences])
    sums = {
        "episodes": torch.tensor(float(len(responses)), device=scores.device),
        "kl": kl.sum(),
        "entropy": -torch.cat([(e.logprobs * e.mask).sum(dim=1) for e in experiences]).sum(),
        "scores": scores.sum(),
        "equal": (groups.amax(dim=1) == groups.amin(dim=1)).sum(),
        "model": model.sum(),
        "penalty": torch.cat([experience.penalties for experience in experiences]).sum(),
        "stopped": torch.cat([experience.episodes.stopped for experience in experiences]).sum(),
        "lengths": lengths.sum(),
        "gaps": gaps.sum(),
    }
    total = stage.sum(sums)
    episodes, tokens = total.pop("episodes"), total["lengths"]
    each = stage.gather(
        [(r.row.index, r.token_ids, *rest) for r, *rest in zip(responses, scores.tolist(), model.tolist(), strict=True)]
    )
    prompts, token_ids, all_scores, model_scores = map(list, zip(*each, strict=True))
    return {
        metrics.KL: total["kl"] / episodes,
        metrics.KL_COEF: kl_coef,
        **({metrics.KL_TARGET: config.kl_target} if config.kl_target is not None else {}),
        metrics.ENTROPY: total["entropy"] / episodes,
        metrics.NON_SCORE_REWARD: total["penalty"] / episodes,
        metrics.RLHF_REWARD: (total["penalty"] + total["scores"]) / episodes,
        metrics.SCORES: total["scores"] / episodes,
        metrics.SCORES_STD: _std(all_scores),
        metrics.SCORE_LENGTH_CORRELATION: _correlation(all_scores, [len(ids) for ids in token_ids]),
        **(
            {metrics.REWARD_MODEL: total["model"] / episodes, metrics.REWARD_MODEL_STD: _std(model_scores)}
            if REWARD in stage.base.roles
            else {}
        ),
        **({metrics.FRAC_REWARD_ZERO_STD: total["equal"] * samples / episodes} if samples > 1 else {}),
        **({metrics.EXPLAINED_VARIANCE: _explained_variance(stage, experiences, tokens)} if config.has_critic else {}),
        metrics.LOGPROB_GAP: total["gaps"] / tokens,
        metrics.LOGPROB_GAP_MAX: max(stage.gather([gaps.max().item()])),
        metrics.LENGTH_MEAN: tokens / episodes,
        **({metrics.TRUNCATED: 1 - total["stopped"] / episodes} if not config.ignore_eos else {}),
        metrics.DISTINCT_2: distinct_2(token_ids),
        metrics.REPETITION: repetition(token_ids),
        metrics.SIMILARITY: similarity(prompts, token_ids),
        metrics.EOS_TOKENS: total["stopped"],
    }


def _std(values: Sequence[float]) -> float:
    """Standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's; NaN where one side is constant."""
    try:
        return statistics.correlation(left, right)
    except statistics.StatisticsError:
        return math.nan


def _explained_variance(stage: Stage[PPOConfig], experiences: Sequence[Experience], tokens: float) -> float:
    """``tokens``: the number of live response tokens of all processes."""
    returns = torch.cat([e.returns[e.mask] for e in experiences])
    errors = returns - torch.cat([e.values[e.mask] for e in experiences])
    sums = {
        "returns": returns.sum(),
        "returns2": returns.double().square().sum(),
        "errors": errors.sum(),
        "errors2": errors.double().square().sum(),
    }
    total = stage.sum(sums)
    variance = total["returns2"] / tokens - (total["returns"] / tokens) ** 2
    left = total["errors2"] / tokens - (total["errors"] / tokens) ** 2
    return 1 - left / variance if variance > 0 else math.nan


def phase_seconds(clock: Sequence[float]) -> dict[Metric, float]:
    """``clock``: the times before rollout, before scoring, before the update and after it."""
    phases = (metrics.SECONDS_ROLLOUT, metrics.SECONDS_SCORE, metrics.SECONDS_UPDATE)
    return {phase: end - start for phase, (start, end) in zip(phases, pairwise(clock), strict=True)}


def log_step(
    stage: Stage[PPOConfig],
    step: int,
    values: Mapping[Metric, float],
    logged: Mapping[str, float],
    responses: Sequence[Response],
    experiences: Sequence[Experience],
    scores: torch.Tensor,
    extras: Mapping[str, Sequence[Any]],
) -> None:
    episodes = step * stage.config.batch_size
    tokens = round(values[metrics.LENGTH_MEAN] * stage.config.batch_size)
    shown = {"score": f"{values[metrics.SCORES]:+.2f}", "KL": f"{values[metrics.KL]:.2f}"}
    stage.log(step, {**values, metrics.EPISODES: episodes}, tokens=tokens, shown=shown, logged=logged)
    stage.log_samples(step, train_samples(stage, responses, experiences, scores.tolist(), extras))


@torch.no_grad()
def evaluate(
    stage: Stage[PPOConfig], rows: Sequence[PromptRow], rewarders: Functions, scorers: Functions, *, step: int
) -> None:
    """Samples one response per held-out prompt, scored by the reward and by every eval function. Every evaluation uses
    the same random draws, so differences between two of them are paired by prompt."""
    config = stage.config
    own = stage.share(rows)
    lengths = sampling_lengths(own, config.response_length)[-config.rollout_batch_size :]
    with (
        seeded(config.seed + 1 + stage.accelerator.process_index),
        memory_for(stage, "evaluation", lengths, "rollout_batch_size", "response_length", "max_length"),
    ):
        responses = generate(
            stage.base,
            POLICY,
            own,
            response_length=config.response_length,
            temperature=config.temperature,
            batch_size=config.rollout_batch_size,
            engine=config.rollout_engine,
            skip_special_tokens=config.reward_skip_special_tokens,
        )
    judged, gold = judge(stage, rewarders, responses), judge(stage, scorers, responses)
    scores = rewarders.weighted(judged.each, len(responses))
    if REWARD in stage.base.roles:
        model: list[float] = []
        for part in stage.micro_batches(responses, response_lengths(responses)):
            with memory_for(stage, "evaluation", response_lengths(part), *MICRO_BATCH, "max_length"):
                episodes = collate_episodes(part, stage.base.pad_id, stage.base.device)
                model += stage.base.scores(REWARD, episodes.input_ids, episodes.attention_mask).tolist()
        scores = [a + b for a, b in zip(scores, model, strict=True)]
    gathered: dict[str, Numbers] = {"scores": stage.gather(scores)}
    gathered |= {name: stage.gather(values) for name, values in gold.each.items()}
    if step == 0:
        stage.values["baseline"] = gathered
    stage.values["latest"] = gathered
    means = {name: mean(present(values)) for name, values in gathered.items()}
    line = {metrics.EVAL_FUNCTION.of(name) if name in gold.each else metrics.EVAL_SCORES: means[name] for name in means}
    stage.log(step, line, shown={metric.name: f"{value:+.2f}" for metric, value in line.items()})
    true_scores = gold.each[scorers.names[0]] if scorers.names else [None] * len(responses)
    samples = [
        {"split": "eval", **sample(response, number), "gold": true_score}
        for response, number, true_score in zip(responses, scores, true_scores, strict=True)
    ]
    stage.log_samples(step, stage.gather(samples))
    stage.report()


def paired_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean of after − before over pairs and its 95% percentile bootstrap interval (10,000 resamples, fixed seed)."""
    difference = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(difference), (RESAMPLES, len(difference)), generator=generator)
    low, high = torch.quantile(
        difference[picks].mean(dim=1), torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    return difference.mean().item(), low, high


def finish(stage: Stage[PPOConfig], scorers: Functions) -> dict[str, Any]:
    """The final table: reward and gold against the SFT model on the held-out prompts, and KL against its target."""
    config = stage.config
    figures: dict[str, Any] = {}
    table = [("steps", str(stage.step), f"{stage.step * config.batch_size} episodes")]
    before, after = stage.values["baseline"], stage.values["latest"]
    for name in before or {}:
        pairs = [pair for pair in zip(before[name], after[name], strict=True) if None not in pair]
        if not pairs:  # the function abstained from every response
            continue
        sft, ppo = zip(*pairs, strict=True)
        gain, low, high = paired_interval(sft, ppo)
        first, last = mean(sft), mean(ppo)
        note = f"PPO minus SFT on {len(pairs)} held-out prompts, paired, 95% interval"
        figures[f"{name}_gain"] = {"value": gain, "low": low, "high": high, "note": note}
        figures |= {f"{name}_sft": first, f"{name}_ppo": last}
        table.append(
            (f"{name}, SFT to PPO", f"{first:+.3f} to {last:+.3f}", f"gain {gain:+.3f} [{low:+.3f}, {high:+.3f}]")
        )
    kl = stage.values.get("kl_history", [])
    if kl:
        third = kl[-math.ceil(len(kl) / 3) :]
        value = sum(third) / len(third)
        target = "no target" if config.kl_target is None else f"target {config.kl_target:g}"
        figures["kl_last_third"] = {
            "value": value,
            "note": f"nats a sequence, mean of the last third of steps; {target}",
        }
        table.append(("KL, last third of steps", f"{value:.2f}", f"nats a sequence; {target}"))
    return stage.finish(figures, table, roles={role: role for role in trained_roles(config)})
