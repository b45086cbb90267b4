"""DPO: the ``policy`` adapter learns to prefer the chosen response, held near the reference, which is the SFT model."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf_fast import metrics
from rlhf_fast.config import DPOConfig
from rlhf_fast.data import PairRow, batch_indices, collate_pairs, preference_rows
from rlhf_fast.models import SharedBase, adapters
from rlhf_fast.ops import DPOLoss, dpo_loss, linear_logprobs
from rlhf_fast.recipes.memory import MICRO_BATCH, memory_for
from rlhf_fast.recipes.pairs import both_lengths, length_difference, pair_lengths, quality_figures, quality_rows
from rlhf_fast.recipes.rows import load_rows
from rlhf_fast.recipes.stage import Stage
from rlhf_fast.rewards.quality import Quality, assess

POLICY, SFT = "policy", "sft"
MEMORY = (*MICRO_BATCH, "max_length")  # settings that reduce memory, in the order in which to lower them


def train(config: DPOConfig, resume_from_checkpoint: str | None = None) -> dict[str, Any]:
    """Runs the stage; writes the policy's adapter to ``output_dir/adapter``.

    Returns the figures of ``summary.json``. ``resume_from_checkpoint`` overrides the config's ("auto" or a folder).
    """
    stage = Stage("dpo", config, resume_from_checkpoint)
    rows, held_out = load_rows(stage, preference_rows, config.max_length)
    if any(row.margin is not None for row in [*rows, *held_out]):
        stage.say("dpo: the data has margins, which only reward training uses")
    stage.check_lengths(both_lengths([*rows, *held_out]))
    reference = add_roles(stage)
    total = config.max_steps or math.ceil(len(rows) * config.num_train_epochs / config.batch_size)
    stage.start([POLICY], total)

    quality = None
    with stage:
        for step in stage.steps():
            batch = [rows[i] for i in batch_indices(len(rows), config.batch_size, step - 1, config.seed)]
            by_length = sorted(stage.share(batch), key=lambda row: len(row.chosen_ids))  # less padding
            totals = torch.zeros(6, device=stage.base.device)
            for micro_batch in stage.micro_batches(by_length, both_lengths(by_length)):
                with memory_for(stage, "update", pair_lengths(micro_batch), *MEMORY):
                    with stage.base.dropout(POLICY):
                        outcome, logprobs = pair_losses(stage.base, config, micro_batch, reference)
                    stage.backward(outcome.loss.sum() / len(batch))
                totals += summed(outcome, logprobs)
            loss, chosen, rejected, right, chosen_logprob, rejected_logprob = (
                stage.accelerator.reduce(totals, reduction="sum") / len(batch)
            ).tolist()
            norm = stage.update(loss, [row.index for row in batch])
            values = {
                metrics.DPO_LOSS: loss,
                metrics.CHOSEN_REWARD: chosen,
                metrics.REJECTED_REWARD: rejected,
                metrics.REWARD_ACCURACY: right,
                metrics.REWARD_MARGIN: chosen - rejected,
                metrics.CHOSEN_LOGPROB: chosen_logprob,
                metrics.REJECTED_LOGPROB: rejected_logprob,
                metrics.GRAD_NORM: norm,
            }
            shown = {"loss": f"{loss:.3f}", "margin": f"{chosen - rejected:.3f}"}
            stage.log(step, values, tokens=sum(both_lengths(batch)), shown=shown)
            due = held_out and stage.evaluation_due(step)
            quality = evaluate(stage, held_out, reference, step=step) if due else None

    if held_out and quality is None:  # stopped between two evaluations, or resumed after its last step
        quality = evaluate(stage, held_out, reference, step=stage.step if stage.stopped_early else None)
    return finish(stage, quality)


def add_roles(stage: Stage[DPOConfig]) -> str | None:
    """Adds the policy, which starts as the SFT model; returns the role of the reference, which is the SFT model."""
    reference = None
    if stage.config.sft_adapter is not None:
        adapters.load_role(stage.base, SFT, stage.config.sft_adapter)
        reference = SFT
    stage.base.add_role(POLICY, copy_of=reference)
    return reference


def pair_losses(
    base: SharedBase, config: DPOConfig, rows: Sequence[PairRow], reference: str | None
) -> tuple[DPOLoss, torch.Tensor]:
    """The loss and the rewards of each pair (N,), and the policy's log-probs (2N,): all chosen, then all rejected.

    The reference goes through the model on its own, without gradient: in one pass with the policy its rows would be
    kept for the backward pass and go through it. Both take rows of the same shapes, so that they round alike and the
    first rewards are exactly 0. The layers below the adapters are computed once for both.
    """
    batch = collate_pairs(rows, base.pad_id)
    assert batch["input_ids"] is not None and batch["attention_mask"] is not None and batch["response_mask"] is not None
    ids, attention_mask = batch["input_ids"].to(base.device), batch["attention_mask"].to(base.device)
    mask = batch["response_mask"][:, 1:].to(base.device)  # a first token of the row has no log-prob
    trunk = base.trunk(ids, attention_mask)

    def response_logprobs(role: str | None) -> torch.Tensor:
        vocabulary = base.vocabulary_of(role)
        return linear_logprobs(
            base.hidden(role, ids, attention_mask, trunk)[:, :-1],  # logits for token t come from position t - 1
            vocabulary.weight,
            ids[:, 1:],
            mask,
            vocab_size=base.vocab_size,
            **vocabulary.options(),
        ).sum(dim=1)

    with torch.no_grad():
        ref = response_logprobs(reference)
    policy = response_logprobs(POLICY)
    scale = 1 / mask.sum(dim=1).clamp(min=1) if config.loss_type == "ipo" else 1
    outcome = dpo_loss(
        *(policy * scale).chunk(2),
        *(ref * scale).chunk(2),
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        loss_type=config.loss_type,
        reduction="none",
    )
    return outcome, policy.detach()


def summed(outcome: DPOLoss, logprobs: torch.Tensor) -> torch.Tensor:
    """(6,), each summed over the pairs: loss, chosen and rejected reward, pairs ranked right, chosen and rejected
    log-prob."""
    right = (outcome.chosen_rewards > outcome.rejected_rewards).float()
    each = (outcome.loss.detach(), outcome.chosen_rewards, outcome.rejected_rewards, right, *logprobs.chunk(2))
    return torch.stack([values.sum() for values in each])


@torch.no_grad()
def evaluate(stage: Stage[DPOConfig], rows: Sequence[PairRow], reference: str | None, *, step: int | None) -> Quality:
    """Quality on held-out pairs, with the implicit rewards as scores; logged under ``step`` if it is given."""
    found: list[tuple[float, float, int, float]] = []
    by_length = sorted(stage.share(rows), key=lambda row: len(row.chosen_ids))
    for part in stage.micro_batches(by_length, both_lengths(by_length)):
        with memory_for(stage, "evaluation", pair_lengths(part), *MEMORY):
            outcome, _ = pair_losses(stage.base, stage.config, part, reference)
        longer = [length_difference(row) for row in part]
        columns = (outcome.chosen_rewards.tolist(), outcome.rejected_rewards.tolist(), longer, outcome.loss.tolist())
        found += zip(*columns, strict=True)
    chosen, rejected, lengths, losses = torch.tensor(stage.gather(found), dtype=torch.float64).unbind(dim=1)
    quality = replace(assess(chosen, rejected, lengths), loss=losses.mean().item())
    if step is not None:
        line = {
            metrics.EVAL_PAIRS: quality.pairs,
            metrics.EVAL_DPO_LOSS: quality.loss,
            metrics.EVAL_REWARD_ACCURACY: quality.accuracy,
            metrics.EVAL_REWARD_ACCURACY_LOW: quality.accuracy_low,
            metrics.EVAL_REWARD_ACCURACY_HIGH: quality.accuracy_high,
            metrics.EVAL_REWARD_MARGIN: quality.margin,
            metrics.EVAL_LENGTH_CORRELATION: quality.length_correlation,
        }
        stage.log(step, line, shown={"accuracy": f"{quality.accuracy:.1%}"})
        stage.report()
    return quality


def finish(stage: Stage[DPOConfig], quality: Quality | None) -> dict[str, Any]:
    config = stage.config
    figures: dict[str, Any] = {"dataset": config.dataset_name, "base": config.model_name_or_path}
    table: list[tuple[str, str, str]] = [
        ("steps", str(stage.step), f"data {config.dataset_name}, base {config.model_name_or_path}")
    ]
    if quality is not None:
        figures |= quality_figures(quality)
        table += quality_rows(quality, f"loss type {config.loss_type}")
    return stage.finish(figures, table, roles={POLICY: "adapter"})
