"""The doctor's checks of a model and of reward functions: a sound model passes, and each defect is found."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_fast.doctor import rewards, start
from rlhf_fast.doctor.findings import run_checks, run_one
from rlhf_fast.doctor.subject import opened


def test_a_sound_ppo_passes_and_each_defect_is_found(ppo, monkeypatch):
    """One model for all defects, each mended before the next: opening one takes most of the time."""
    sound = {one.name: one for one in run_checks("ppo", start.CHECKS, ppo)}
    assert {name: one.found for name, one in sound.items() if one.level != "ok"} == {}
    assert len(sound) == 8 and "random in place of adapters" in sound["base_model"].found

    def broken(check, said: str, level: str = "error") -> None:
        found = run_one(check, ppo)
        assert found is not None and found.level == level and said in found.found, found
        monkeypatch.undo()

    dropped = torch.nn.Dropout(0.5)
    handle = ppo.base.decoder.layers[-1].register_forward_hook(lambda module, args, out: dropped(out))
    broken(start.dropout, "differ for the base, sft, reward, policy, critic; every module is in eval mode")
    handle.remove()

    scores = ppo.base.scores

    def padded(role, ids, mask):
        return scores(role, ids, mask) + 0.1 * (1 - mask).sum(dim=1)

    monkeypatch.setattr(ppo.base, "scores", padded)
    broken(start.reward_padding, "with padding on the right and")

    scored = start.ppo.scored

    def other_beside_others(stage, responses, reference):
        experience = scored(stage, responses, reference)
        return replace(experience, logprobs=experience.logprobs * len(responses))

    monkeypatch.setattr(start.ppo, "scored", other_beside_others)
    broken(start.left_padding, "padded on the left to one batch")

    losses = start.ppo.losses
    monkeypatch.setattr(start.ppo, "losses", lambda *args: losses(*args) | {"approx_kl": torch.tensor(0.5)})
    broken(start.start_ratio, "on the first mini-batch the log ratio is 1 ")

    for place, response in enumerate(ppo.responses):
        ppo.responses[place] = replace(response, logprobs=[one - 0.5 for one in response.logprobs])
    broken(start.sampling, "differ by 0.5 nats a token")

    with torch.no_grad():
        for name, parameter in ppo.base.named_parameters("policy").items():
            parameter.add_(0.1 if "lora_B" in name else 0.0)
    broken(start.start_kl, "which must be the same model")

    ppo.base.stop_ids = []
    broken(start.answer_end, "no token ends a response", "warning")


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_the_other_stages_pass(data_of, stage):
    with opened(data_of(stage), set()) as model:
        found = {one.name: one for one in run_checks(stage, start.CHECKS, model)}
    assert {name: one.found for name, one in found.items() if one.level != "ok"} == {}
    assert {"sft": "dropout", "reward": "reward_padding", "dpo": "start_kl"}[stage] in found


def test_answers_without_an_end_are_an_error(data_of):
    with opened(data_of("sft", max_length=8), set()) as model:
        found = start.answer_end(model)
    assert found.level == "error" and found.found.startswith("0 of ")


def test_an_adapter_that_no_stage_makes_is_an_error(data_of, tmp_path):
    def of_model(_):
        with opened(data_of("ppo", sft_adapter=str(tmp_path / "none")), {"reward"}):
            pass

    assert "no adapter folder" in run_one(of_model, None).found


def test_reward_functions_are_called_once(ppo, tmp_path):
    file = tmp_path / "functions.py"
    file.write_text(
        "def flat(completions, **columns):\n    return [1.0] * len(completions)\n"
        "def length(completions, number, **columns):\n    return [float(n) for n in number]\n"
        "def nan(completions, **columns):\n    return [float('nan')] * len(completions)\n"
        "def wrong(completions, **columns):\n    return [1 / 0]\n"
    )

    def checked(*names: str):
        return run_one(lambda stage: rewards.called(stage, [f"{file}:{name}" for name in names]), ppo)

    assert checked() is None
    assert checked("length").level == "ok" and "length: " in checked("length").found
    found = checked("length", "flat")
    assert found.level == "warning" and found.found.endswith("the same for all of them (flat)")
    assert checked("nan").level == "error" and "finite numbers; got nan" in checked("nan").found
    assert checked("wrong").level == "error" and "raised ZeroDivisionError" in checked("wrong").found
    assert checked("gone").level == "error"


def test_a_check_that_fails_is_an_error_with_its_line_and_the_others_run():
    def first(subject):
        return math.log(subject)

    def second(subject):
        return None

    (found,) = run_checks("sft", [first, second], 0)
    assert (found.level, found.name, found.stage) == ("error", "first", "sft")
    assert f"ValueError: math domain error ({Path(__file__).name}, line " in found.found
