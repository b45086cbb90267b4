"""DPO: it learns a preference, the reference stays as it is, and its log-probs are those of transformers and PEFT."""

import json
import math

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from rlhf_fast import ops
from rlhf_fast.config import DPO_LOSSES, SMOOTHED_DPO_LOSSES
from rlhf_fast.data import preference_rows
from rlhf_fast.errors import UserError
from rlhf_fast.models import pretrained
from rlhf_fast.recipes import dpo
from rlhf_fast.recipes.rows import load_rows
from rlhf_fast.recipes.stage import Stage


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def training_lines(folder):
    return [line for line in lines(folder) if "grad_norm" in line]


def test_learns_a_difference_that_is_there(dpo_config, trained, tmp_path):
    figures = dpo.train(dpo_config(max_steps=12, sft_adapter=trained["sft_adapter"]))
    assert figures["accuracy"]["value"] == 1.0
    assert figures["loss"] < 0.3
    first, *_, last = training_lines(tmp_path / "dpo")
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)  # policy and reference are the same model
    assert (first["rewards/chosen"], first["rewards/rejected"]) == (0.0, 0.0)
    assert (
        last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
        and last["loss"] < 0.3
    )
    assert last["rewards/accuracies"] == 1.0
    evaluation = [line for line in lines(tmp_path / "dpo") if "eval_loss" in line][-1]
    assert evaluation["eval_rewards/accuracies_low"] < evaluation["eval_rewards/accuracies"] == 1.0
    report = (tmp_path / "dpo" / "report.html").read_text()
    assert "<h3>Implicit rewards</h3>" in report and "Reliability" in report


@pytest.mark.parametrize("with_sft", [False, True])
def test_the_reference_is_the_sft_model_and_stays_so(dpo_config, trained, with_sft, monkeypatch):
    kept = {}
    real = dpo.finish

    def finish(stage, quality):
        kept.update(stage=stage)
        return real(stage, quality)

    monkeypatch.setattr(dpo, "finish", finish)
    dpo.train(dpo_config(sft_adapter=trained["sft_adapter"] if with_sft else None))
    base = kept["stage"].base
    assert base.roles == (["sft", "policy"] if with_sft else ["policy"])
    fresh = Stage("dpo", dpo_config("fresh", sft_adapter=trained["sft_adapter"] if with_sft else None))
    reference = dpo.add_roles(fresh)
    assert reference == ("sft" if with_sft else None)
    ids = torch.tensor([[5, 6, 7]])
    now, then = (b.hidden(reference, ids, torch.ones_like(ids)) for b in (base, fresh.base))
    assert now.equal(then)
    assert not now.equal(base.hidden("policy", ids, torch.ones_like(ids)))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_the_loss_is_that_of_transformers_and_peft(dpo_config, trained, loss_type, tmp_path):
    """Row by row, without padding, from whole logits; the policy has moved away from the reference."""
    config = dpo_config(sft_adapter=trained["sft_adapter"], loss_type=loss_type)
    dpo.train(config)
    stage = Stage("dpo", dpo_config("again", sft_adapter=str(tmp_path / "dpo" / "adapter"), loss_type=loss_type))
    rows, _ = load_rows(stage, preference_rows, config.max_length)
    dpo.adapters.load_role(stage.base, "reference", trained["sft_adapter"])
    dpo.add_roles(stage)
    outcome, logprobs = dpo.pair_losses(stage.base, config, rows[:4], "reference")

    def response_logprob(model, ids, response_length):
        logits = model(torch.tensor([ids])).logits[0, :-1, : stage.base.vocab_size].double()
        chosen = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]][-response_length:]
        return chosen.mean() if loss_type == "ipo" else chosen.sum()

    expected = []
    with pretrained.located(config.model_name_or_path) as source, torch.no_grad():
        for adapter in (str(tmp_path / "dpo" / "adapter"), trained["sft_adapter"]):
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), adapter).eval()
            expected.append(
                [
                    response_logprob(model, row.chosen_ids, row.chosen_response_length)
                    - response_logprob(model, row.rejected_ids, row.rejected_response_length)
                    for row in rows[:4]
                ]
            )
    difference = torch.tensor(expected[0]) - torch.tensor(expected[1])
    beta = config.beta
    loss = (difference - 1 / (2 * beta)).square() if loss_type == "ipo" else -logsigmoid(beta * difference)
    assert difference.abs().min() > 1e-3
    torch.testing.assert_close(outcome.loss.detach().double(), loss.double(), rtol=1e-4, atol=1e-5)
    assert logprobs.shape == (8,)


def test_layers_below_the_adapters_are_computed_once_for_both_roles(dpo_config, trained, monkeypatch):
    stage = Stage("dpo", dpo_config(sft_adapter=trained["sft_adapter"]))
    rows, _ = load_rows(stage, preference_rows, 64)
    reference = dpo.add_roles(stage)
    with torch.no_grad():
        for parameter in stage.base.named_parameters("policy").values():
            parameter.add_(0.01)
    shared, _ = dpo.pair_losses(stage.base, stage.config, rows[:4], reference)
    assert stage.base.trunk(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)) is not None
    monkeypatch.setattr(type(stage.base), "trunk", lambda *_: None)
    separate, _ = dpo.pair_losses(stage.base, stage.config, rows[:4], reference)
    assert shared.loss.equal(separate.loss) and shared.loss.std() > 0


def test_micro_batches_change_no_gradient(dpo_config, tmp_path):
    norms = []
    for settings in ({"micro_batch_size": 8}, {"micro_batch_size": None, "micro_batch_tokens": 200}):
        dpo.train(dpo_config(overwrite_output_dir=True, eval_size=0, max_steps=2, **settings))
        norms.append([line["grad_norm"] for line in training_lines(tmp_path / "dpo")])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_adapter_goes_on_to_another_stage(dpo_config, sft_config, trained, tmp_path):
    dpo.train(dpo_config(sft_adapter=trained["sft_adapter"], max_steps=1))
    again = dpo.train(dpo_config("again", sft_adapter=str(tmp_path / "dpo" / "adapter"), max_steps=1))
    assert again["steps"] == 1


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_every_loss_type_trains(dpo_config, loss_type, tmp_path):
    smoothing = 0.1 if loss_type in SMOOTHED_DPO_LOSSES else 0.0
    dpo.train(dpo_config(loss_type=loss_type, label_smoothing=smoothing, max_steps=1, eval_size=0))
    (line,) = training_lines(tmp_path / "dpo")
    assert line["grad_norm"] > 0
    zero = torch.zeros(1)
    start = ops.dpo_loss(zero, zero, zero, zero, loss_type=loss_type, label_smoothing=smoothing).loss.item()
    assert line["loss"] == pytest.approx(start, rel=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.0}, "--beta must be above 0; got 0.0"),
        ({"loss_type": "sigmoyd"}, "--loss_type must be one of sigmoid, ipo, .*; got 'sigmoyd'"),
        ({"label_smoothing": 0.5}, "--label_smoothing must be from 0 to below 0.5; got 0.5"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "--label_smoothing must be 0 with --loss_type ipo; got 0.1"),
        ({"loss_type": "exo_pair"}, "--label_smoothing must be above 0 with --loss_type exo_pair; got 0.0"),
        ({"sft_adapter": "no_such"}, "no adapter folder no_such"),
        ({"micro_batch_size": None, "micro_batch_tokens": 10}, "--micro_batch_tokens must hold the longest example"),
    ],
)
def test_mistakes_are_told(dpo_config, settings, message):
    with pytest.raises(UserError, match=message):
        dpo.train(dpo_config(**settings))


def test_margins_in_the_data_are_not_passed_over_in_silence(dpo_config, data, tmp_path, capsys):
    rows = [json.loads(line) | {"margin": 1.0} for line in open(data["reward"])]
    path = tmp_path / "margins.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo.train(dpo_config(dataset_name=str(path), max_steps=1))
    assert "the data has margins, which only reward training uses" in capsys.readouterr().err
