"""The reward model: the ``reward`` adapter and its head learn to score the preferred response higher."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rlhf_fast import metrics
from rlhf_fast.config import RewardConfig
from rlhf_fast.data import PairRow, PromptRow, batch_indices, collate_pairs, epoch_order, preference_rows
from rlhf_fast.metrics import Metric
from rlhf_fast.models import adapters
from rlhf_fast.ops import pairwise_loss
from rlhf_fast.recipes.memory import MICRO_BATCH, memory_for, response_lengths, sampling_lengths
from rlhf_fast.recipes.pairs import both_lengths, length_difference, pair_lengths, quality_figures, quality_rows
from rlhf_fast.recipes.reward_card import Calibration, HeldOut, write_card
from rlhf_fast.recipes.rows import load_prompts, load_rows
from rlhf_fast.recipes.stage import Stage, seeded
from rlhf_fast.rewards.quality import assess
from rlhf_fast.rollout import collate_episodes, generate

ROLE, SFT = "reward", "sft"
MEMORY = (*MICRO_BATCH, "max_length")  # settings that reduce memory, in the order in which to lower them


def train(config: RewardConfig, resume_from_checkpoint: str | None = None) -> dict[str, Any]:
    """Runs the stage and calibrates the scores; writes adapter, head and calibration to ``output_dir/adapter``.

    Returns the figures of ``summary.json``. ``resume_from_checkpoint`` overrides the config's ("auto" or a folder).
    """
    stage = Stage("reward", config, resume_from_checkpoint)
    rows, held_out = load_rows(stage, preference_rows, config.max_length)
    window = config.max_length - config.response_length
    prompts = load_prompts(stage, config.dataset_name, config.dataset_split, window)
    stage.check_lengths(both_lengths([*rows, *held_out]))
    sft = None
    if config.sft_adapter is not None:
        adapters.load_role(stage.base, SFT, config.sft_adapter)
        sft = SFT
    stage.base.add_role(ROLE, copy_of=sft, head=True)
    total = config.max_steps or math.ceil(len(rows) * config.num_train_epochs / config.batch_size)
    stage.start([ROLE], total, values={"evaluated": False})

    found = None
    if held_out and not stage.values["evaluated"]:
        found = evaluate(stage, held_out, step=0)
        stage.values["evaluated"] = True
    with stage:
        for step in stage.steps():
            batch = [rows[i] for i in batch_indices(len(rows), config.batch_size, step - 1, config.seed)]
            by_length = sorted(stage.share(batch), key=lambda row: len(row.chosen_ids))  # less padding
            totals = torch.zeros(3, device=stage.base.device)  # loss, pairs ranked right, margin; summed over pairs
            for micro_batch in stage.micro_batches(by_length, both_lengths(by_length)):
                with memory_for(stage, "update", pair_lengths(micro_batch), *MEMORY):
                    with stage.base.dropout(ROLE):
                        chosen, rejected, margin = score_pairs(stage, micro_batch)
                    ranking = pairwise_loss(chosen, rejected, margin) * len(micro_batch)
                    centring = config.centre_coef * (chosen + rejected).square().sum()
                    stage.backward((ranking + centring) / len(batch))
                right = (chosen > rejected).sum()
                totals += torch.stack([ranking.detach(), right.float(), (chosen - rejected).detach().sum()])
            loss, accuracy, mean_margin = (stage.accelerator.reduce(totals, reduction="sum") / len(batch)).tolist()
            norm = stage.update(loss, [row.index for row in batch])
            values = {
                metrics.PAIR_LOSS: loss,
                metrics.ACCURACY: accuracy,
                metrics.MARGIN: mean_margin,
                metrics.GRAD_NORM: norm,
            }
            tokens = sum(len(row.chosen_ids) + len(row.rejected_ids) for row in batch)
            stage.log(step, values, tokens=tokens, shown={"loss": f"{loss:.3f}"})
            found = evaluate(stage, held_out, step=step) if held_out and stage.evaluation_due(step) else None

    if held_out and found is None:  # stopped between two evaluations, or resumed after its last step
        found = evaluate(stage, held_out, step=stage.step if stage.stopped_early else None)
    if found is not None:
        found = tried(stage, held_out, found)
    return finish(stage, found, calibrate(stage, sft, prompts))


def score_pairs(
    stage: Stage[RewardConfig], rows: Sequence[PairRow]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scores of the chosen and the rejected side, (N,) each, and the data's margins (N,) or None."""
    batch = collate_pairs(rows, stage.base.pad_id)
    device = stage.base.device
    assert batch["input_ids"] is not None and batch["attention_mask"] is not None
    scores = stage.base.scores(ROLE, batch["input_ids"].to(device), batch["attention_mask"].to(device))
    chosen, rejected = scores.chunk(2)
    return chosen, rejected, None if batch["margin"] is None else batch["margin"].to(device)


@torch.no_grad()
def held_out_scores(stage: Stage[RewardConfig], rows: Sequence[PairRow]) -> torch.Tensor:
    """(N, 2) float64: the scores of the chosen and of the rejected side, in the order of ``rows``."""
    found: list[tuple[int, float, float]] = []
    own = sorted(stage.share(list(enumerate(rows))), key=lambda item: len(item[1].chosen_ids))
    for part in stage.micro_batches(own, both_lengths([row for _, row in own])):
        pairs = [row for _, row in part]
        with memory_for(stage, "evaluation", pair_lengths(pairs), *MEMORY):
            chosen, rejected, _ = score_pairs(stage, pairs)
        found += zip([place for place, _ in part], chosen.tolist(), rejected.tolist(), strict=True)
    return torch.tensor([scores for _, *scores in sorted(stage.gather(found))], dtype=torch.float64)


def evaluate(stage: Stage[RewardConfig], rows: Sequence[PairRow], *, step: int | None) -> HeldOut:
    """Scores and quality on held-out pairs, logged under ``step`` if it is given."""
    scores = held_out_scores(stage, rows)
    quality = assess(scores[:, 0], scores[:, 1], torch.tensor([length_difference(row) for row in rows]))
    if step is not None:
        line: dict[Metric, float] = {
            metrics.EVAL_PAIRS: quality.pairs,
            metrics.EVAL_PAIR_LOSS: quality.loss,
            metrics.EVAL_ACCURACY: quality.accuracy,
            metrics.EVAL_ACCURACY_LOW: quality.accuracy_low,
            metrics.EVAL_ACCURACY_HIGH: quality.accuracy_high,
            metrics.EVAL_MARGIN: quality.margin,
            metrics.EVAL_LENGTH_CORRELATION: quality.length_correlation,
            metrics.EVAL_LENGTH_ACCURACY: quality.length_accuracy,
            metrics.EVAL_CALIBRATION_ERROR: quality.calibration_error,
        }
        if stage.config.label_noise_ceiling is not None:
            line[metrics.NOISE_CEILING] = stage.config.label_noise_ceiling
        stage.log(step, line, shown={"accuracy": f"{quality.accuracy:.1%}"})
        stage.report()
    return HeldOut(rows, quality, scores)


def tried(stage: Stage[RewardConfig], rows: Sequence[PairRow], found: HeldOut) -> HeldOut:
    """``found`` with the scores of responses cut to half their tokens, and of a quarter of the pairs with their sides
    exchanged: together less than one more pass over the pairs, since the cut ones are shorter."""
    exchanged = [
        replace(
            row,
            chosen_ids=row.rejected_ids,
            rejected_ids=row.chosen_ids,
            chosen_response_length=row.rejected_response_length,
            rejected_response_length=row.chosen_response_length,
        )
        for row in rows[: max(1, len(rows) // 4)]
    ]
    half = held_out_scores(stage, [halved(row) for row in rows])
    return found._replace(half=half, exchanged=held_out_scores(stage, exchanged))


def halved(row: PairRow) -> PairRow:
    """The pair with each response cut to half its tokens, rounded up."""
    chosen, rejected = row.chosen_response_length // 2, row.rejected_response_length // 2
    return replace(
        row,
        chosen_ids=row.chosen_ids[: len(row.chosen_ids) - chosen],
        rejected_ids=row.rejected_ids[: len(row.rejected_ids) - rejected],
        chosen_response_length=row.chosen_response_length - chosen,
        rejected_response_length=row.rejected_response_length - rejected,
    )


@torch.no_grad()
def calibrate(stage: Stage[RewardConfig], sft: str | None, prompts: Sequence[PromptRow]) -> Calibration:
    """Mean and std of the raw scores of responses sampled from the SFT model. Calibrates the head with them."""
    config = stage.config
    chosen = [prompts[i] for i in epoch_order(len(prompts), config.seed, 0)]
    distinct = list({row.prompt_key: row for row in chosen}.values())[: config.calibration_prompts]
    head = stage.base.heads[ROLE]
    head.calibrate(0.0, 1.0)
    own = stage.share(distinct)
    whole = sampling_lengths(own, config.response_length)
    batch_size = 2 * max(len(part) for part in stage.micro_batches(whole, whole)) if own else 1
    longest = whole[-batch_size:]
    with (
        seeded(config.seed + stage.accelerator.process_index),
        memory_for(stage, "calibration", longest, *MICRO_BATCH, "response_length", "max_length"),
    ):
        responses = generate(
            stage.base,
            sft,
            own,
            response_length=config.response_length,
            temperature=config.temperature,
            batch_size=batch_size,
            engine=config.rollout_engine,
        )
    scores: list[float] = []
    for part in stage.micro_batches(responses, response_lengths(responses)):
        with memory_for(stage, "calibration", response_lengths(part), *MEMORY):
            batch = collate_episodes(part, stage.base.pad_id, stage.base.device)
            scores += stage.base.scores(ROLE, batch.input_ids, batch.attention_mask).tolist()
    all_scores = torch.tensor(stage.gather(scores), dtype=torch.float64)
    mean = all_scores.mean().item()
    std = all_scores.std().item() if len(all_scores) > 1 else 0.0
    if not std > 0:
        stage.say("reward: every sample of the SFT model has the same score; scores are shifted and not scaled")
        std = 1.0
    head.calibrate(mean, std)
    return Calibration(mean, std, all_scores)


def finish(stage: Stage[RewardConfig], found: HeldOut | None, constants: Calibration) -> dict[str, Any]:
    config = stage.config
    mean, std, _ = constants
    figures: dict[str, Any] = {
        "dataset": config.dataset_name,
        "base": config.model_name_or_path,
        "calibration_mean": mean,
        "calibration_std": std,
    }
    table: list[tuple[str, str, str]] = [
        ("steps", str(stage.step), f"data {config.dataset_name}, base {config.model_name_or_path}")
    ]
    if found is not None:
        quality = found.quality
        ceiling = config.label_noise_ceiling
        if ceiling is not None:
            figures["label_noise_ceiling"] = ceiling
        figures |= quality_figures(quality)
        table += quality_rows(quality, "log 2 = 0.693 is guessing", ceiling)
        for warning in quality.warnings(ceiling):
            stage.say(f"reward: {warning}")
    table.append(("scores of SFT samples", f"{mean:+.3f} ± {std:.3f}", "shifted and scaled to 0 ± 1 for PPO"))
    card = partial(write_card, config=config, steps=stage.step, found=found, calibration=constants)
    return stage.finish(figures, table, roles={ROLE: "adapter"}, also=card)
