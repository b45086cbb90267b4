"""SFT: the loss is over response tokens, accumulation does not change it, the best adapter is kept."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.data import SFTRow
from rlhf_fast.errors import UserError
from rlhf_fast.recipes import sft
from rlhf_fast.recipes.stage import Stage


def metrics(folder: Path, key: str) -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


def test_learns(sft_config, tmp_path):
    figures = sft.train(sft_config(max_steps=12))
    assert figures["validation_loss"]["value"] < figures["validation_loss_first"] - 1.0
    assert metrics(tmp_path / "sft", "loss")[-1] < metrics(tmp_path / "sft", "loss")[0] - 1.0


def test_the_first_loss_is_that_of_a_plain_transformers_forward_over_response_tokens(sft_config):
    config = sft_config()
    stage = Stage("sft", config)
    stage.base.add_role("sft")
    ids = stage.base.tokenizer("a prompt and its answer")["input_ids"]
    rows = [
        SFTRow(index=1, input_ids=ids, response_mask=[0] * 9 + [1] * (len(ids) - 9), prompt_key="a"),
        SFTRow(index=2, input_ids=ids[:12], response_mask=[0] * 4 + [1] * 8, prompt_key="b"),
    ]
    expected = 0.0
    for row in rows:
        logits = stage.base.model(torch.tensor([row.input_ids])).logits[0, :, : stage.base.vocab_size].double()
        logprobs = logits.log_softmax(dim=-1)
        expected -= sum(
            logprobs[t - 1, row.input_ids[t]].item() for t in range(1, len(row.input_ids)) if row.response_mask[t]
        )
    assert sft.loss_sum(stage, rows).item() == pytest.approx(expected, rel=1e-5)
    assert [sft.target_count(row) for row in rows] == [len(ids) - 9, 8]


def test_accumulation_divides_by_the_tokens_of_the_whole_batch(sft_config, tmp_path):
    sft.train(sft_config("small", micro_batch_size=1))
    sft.train(sft_config("large", micro_batch_size=8))
    small, large = metrics(tmp_path / "small", "loss"), metrics(tmp_path / "large", "loss")
    assert small == pytest.approx(large, rel=1e-4)
    assert len(small) == 4


def test_a_token_budget_changes_no_gradient(sft_config, tmp_path, monkeypatch):
    parts = []
    real = sft.loss_sum
    monkeypatch.setattr(sft, "loss_sum", lambda stage, rows: parts.append(sft.row_lengths(rows)) or real(stage, rows))
    sft.train(sft_config("whole", micro_batch_size=8, eval_size=0))
    parts.clear()
    sft.train(sft_config("budget", micro_batch_size=None, micro_batch_tokens=100, eval_size=0))
    assert metrics(tmp_path / "budget", "loss") == pytest.approx(metrics(tmp_path / "whole", "loss"), rel=1e-5)
    norms = [metrics(tmp_path / name, "grad_norm") for name in ("budget", "whole")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert max(map(sum, parts)) <= 100 and max(map(len, parts)) > 1 and len(parts) > 4


def test_a_budget_below_one_sequence_is_refused(sft_config):
    expected = r"--micro_batch_tokens must hold the longest example, of \d+ tokens; got 5: set it to \d+ or above"
    with pytest.raises(UserError, match=expected):
        sft.train(sft_config(micro_batch_size=None, micro_batch_tokens=5))


def test_stops_when_validation_gets_worse_and_keeps_the_best_adapter(sft_config, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 1.0, 1.5, 1.2, 1.1, 0.5])
    real = sft.loss_sum
    monkeypatch.setattr(
        sft,
        "loss_sum",
        lambda stage, rows: real(stage, rows) if torch.is_grad_enabled() else torch.tensor(next(losses)),
    )
    monkeypatch.setattr(sft, "target_count", lambda row: 1)
    figures = sft.train(sft_config(max_steps=10, eval_steps=1, micro_batch_size=8, patience=2, learning_rate=1e-4))
    assert figures["steps"] == 4  # evaluated after steps 0 to 4: best after 2, worse after 3 and 4
    assert figures["validation_loss"]["note"] == "best, at step 2"
    assert "has not improved for 2 evaluations" in capsys.readouterr().err
    best = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    last = load_file(tmp_path / "sft" / "checkpoint-4" / "sft" / "adapter_model.safetensors")
    assert any(not tensor.equal(last[name]) for name, tensor in best.items())


def test_without_held_out_rows_the_last_adapter_is_kept(sft_config, tmp_path):
    figures = sft.train(sft_config(eval_size=0))
    assert "validation_loss" not in figures
    kept = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    last = load_file(tmp_path / "sft" / "checkpoint-4" / "sft" / "adapter_model.safetensors")
    assert all(tensor.equal(last[name]) for name, tensor in kept.items())


def test_warm_up_and_schedule(sft_config, tmp_path):
    sft.train(sft_config(max_steps=4, warmup_ratio=0.5, learning_rate=1e-3, lr_scheduler_type="linear"))
    assert metrics(tmp_path / "sft", "lr") == pytest.approx([0.5e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])


def test_every_metric_is_finite(sft_config, tmp_path):
    sft.train(sft_config())
    for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(value) for value in json.loads(line).values())


def test_trackers_get_the_metrics_of_the_log(sft_config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sft.train(sft_config(report_to=["tensorboard"]))
    written = (tmp_path / "sft" / "runs").rglob("events.out.tfevents.*")
    events = min(written, key=lambda path: int(path.suffix[1:]))  # numbered in the process; the second has the settings
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    logged = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert [step for step, _ in logged] == [1, 2, 3, 4]
    assert [value for _, value in logged] == pytest.approx(metrics(tmp_path / "sft", "loss"))


def test_a_response_ends_where_the_chat_template_ends_it(sft_config, capsys):
    """Chat templates on base models often end a turn with a token other than the tokenizer's EOS."""
    template = "{% for message in messages %}{{ message['content'] + '<pad>' }}{% endfor %}"
    stage = Stage("sft", sft_config(chat_template=template))
    closing, eos = stage.base.tokenizer.convert_tokens_to_ids(["<pad>", "<end>"])
    assert stage.base.stop_ids == sorted([closing, eos])
    assert "responses also end at '<pad>'" in capsys.readouterr().err
    assert Stage("sft", sft_config("own")).base.stop_ids == [eos]
    # string columns do not use the template, so it may reject answers
    strict = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0]['content'] }}"
    assert Stage("sft", sft_config("strict", chat_template=strict)).base.stop_ids == [eos]
