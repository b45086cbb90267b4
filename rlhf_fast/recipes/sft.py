"""Supervised fine-tuning: the ``sft`` adapter learns the response tokens of demonstrations."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_fast import metrics
from rlhf_fast.config import SFTConfig
from rlhf_fast.data import SFTRow, batch_indices, collate_sft, sft_rows
from rlhf_fast.ops import linear_cross_entropy
from rlhf_fast.recipes.memory import MICRO_BATCH, memory_for
from rlhf_fast.recipes.rows import load_rows
from rlhf_fast.recipes.stage import Stage

ROLE = "sft"
MEMORY = (*MICRO_BATCH, "max_length")  # settings that reduce memory, in the order in which to lower them


def train(config: SFTConfig, resume_from_checkpoint: str | None = None) -> dict[str, Any]:
    """Runs the stage; writes the adapter with the lowest validation loss to ``output_dir/adapter``.

    Returns the figures of ``summary.json``. ``resume_from_checkpoint`` overrides the config's ("auto" or a folder).
    """
    stage = Stage("sft", config, resume_from_checkpoint)
    rows, held_out = load_rows(stage, sft_rows, config.max_length)
    stage.check_lengths(row_lengths([*rows, *held_out]))
    stage.base.add_role(ROLE)
    total = config.max_steps or math.ceil(len(rows) * config.num_train_epochs / config.batch_size)
    stage.start([ROLE], total, values={"first_loss": None, "best_loss": None, "best_step": 0, "worse": 0})
    stage.stopped_early = stage.values["worse"] >= config.patience  # a resumed run that had stopped early

    if stage.values["first_loss"] is None and held_out:
        validate(stage, held_out, step=0)
    with stage:
        for step in stage.steps():
            batch = [rows[i] for i in batch_indices(len(rows), config.batch_size, step - 1, config.seed)]
            tokens = sum(target_count(row) for row in batch)
            summed = torch.zeros((), device=stage.base.device)
            by_length = sorted(stage.share(batch), key=lambda row: len(row.input_ids))  # less padding
            for micro_batch in stage.micro_batches(by_length, row_lengths(by_length)):
                with memory_for(stage, "update", row_lengths(micro_batch), *MEMORY):
                    with stage.base.dropout(ROLE):
                        loss = loss_sum(stage, micro_batch) / tokens
                    stage.backward(loss)
                summed += loss.detach()
            loss_value = stage.accelerator.reduce(summed, reduction="sum").item()
            norm = stage.update(loss_value, [row.index for row in batch])
            values = {metrics.SFT_LOSS: loss_value, metrics.GRAD_NORM: norm}
            stage.log(step, values, tokens=tokens, shown={"loss": f"{loss_value:.3f}"})
            if held_out and stage.evaluation_due(step):
                stage.stopped_early = not validate(stage, held_out, step=step)

    return finish(stage)


def loss_sum(stage: Stage[SFTConfig], rows: Sequence[SFTRow]) -> torch.Tensor:
    """Cross-entropy summed over the rows' response tokens."""
    batch = collate_sft(rows, stage.base.pad_id)
    device, vocabulary = stage.base.device, stage.base.vocabulary_of(ROLE)
    hidden = stage.base.hidden(ROLE, batch["input_ids"].to(device), batch["attention_mask"].to(device))
    return linear_cross_entropy(
        hidden[:, :-1],  # logits for token t come from position t - 1
        vocabulary.weight,
        batch["labels"][:, 1:].to(device),
        vocab_size=stage.base.vocab_size,
        reduction="sum",
        **vocabulary.options(),
    )


def row_lengths(rows: Sequence[SFTRow]) -> list[int]:
    return [len(row.input_ids) for row in rows]


def target_count(row: SFTRow) -> int:
    """The number of response tokens that are predicted: all but a first token of the row."""
    return sum(row.response_mask[1:])


@torch.no_grad()
def validate(stage: Stage[SFTConfig], rows: Sequence[SFTRow], *, step: int) -> bool:
    """Logs the validation loss and keeps the best adapter; False when patience has run out."""
    summed = torch.zeros((), device=stage.base.device)
    by_length = sorted(stage.share(rows), key=lambda row: len(row.input_ids))
    for part in stage.micro_batches(by_length, row_lengths(by_length)):
        with memory_for(stage, "evaluation", row_lengths(part), *MEMORY):
            summed += loss_sum(stage, part)
    losses = stage.gather([float(summed)])
    loss = sum(losses) / sum(target_count(row) for row in rows)
    stage.log(step, {metrics.SFT_EVAL_LOSS: loss}, shown={"eval_loss": f"{loss:.3f}"})
    values = stage.values
    if step == 0:
        values["first_loss"] = loss
    if values["best_loss"] is None or loss < values["best_loss"]:
        values.update(best_loss=loss, best_step=step, worse=0)
        stage.keep_best()
    else:
        values["worse"] += 1
    stage.report()
    patience = stage.config.patience
    if values["worse"] >= patience:
        stage.say(f"sft: validation loss has not improved for {patience} evaluations; stopping at step {step}")
    return values["worse"] < patience


def finish(stage: Stage[SFTConfig]) -> dict[str, Any]:
    """Writes the best adapter as ``adapter``; without held-out rows, the last one."""
    values = stage.values
    figures: dict[str, Any] = {}
    table = [("steps", str(stage.step), f"of {stage.total}")]
    if values["best_loss"] is None:
        table.append(("validation loss", "-", "no held-out rows (--eval_size 0)"))
        return stage.finish(figures, table, roles={ROLE: "adapter"})
    figures |= {
        "validation_loss_first": values["first_loss"],
        "validation_loss": {"value": values["best_loss"], "note": f"best, at step {values['best_step']}"},
    }
    table.append(("validation loss, first", f"{values['first_loss']:.4f}", "before training"))
    table.append(("validation loss, best", f"{values['best_loss']:.4f}", f"step {values['best_step']}, kept"))
    stage.finish_with_best("adapter")
    return stage.finish(figures, table, roles={})
