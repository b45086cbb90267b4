"""PPO without a critic: advantages from several responses to each prompt."""

import json
from dataclasses import replace

import pytest
import torch
from test_ppo import metrics, spy_on_first_mini_batches, started

from rlhf_fast.config import ADVANTAGE_ESTIMATORS
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase
from rlhf_fast.ops import group_advantages
from rlhf_fast.ops.group_advantages import ESTIMATORS
from rlhf_fast.recipes import experience, ppo

OF_CRITIC = {"critic/explained_variance", "loss/value_avg", "val/clipfrac_avg"}


def test_every_estimator_can_be_set():
    assert ADVANTAGE_ESTIMATORS == ("gae", *ESTIMATORS)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_learns_a_reward_without_a_critic(estimator, ppo_config, tmp_path):
    (tmp_path / "reward.py").write_text(
        "def letters(prompts, completions):\n    return [sum(x == 'o' for x in c) - len(c) / 6 for c in completions]\n"
    )
    config = ppo_config(
        advantage_estimator=estimator,
        num_generations=4,
        reward_adapter=None,
        reward_functions=[f"{tmp_path}/reward.py:letters"],
        batch_size=32,
        micro_batch_size=16,
        max_steps=10,
        learning_rate=2e-2,
        missing_eos_penalty=0.0,
        kl_coef=0.0,
        kl_target=None,
        seed=1,
    )
    summary = ppo.train(config)
    lines = metrics(tmp_path / "ppo")
    assert lines[-1]["objective/scores"] - lines[0]["objective/scores"] > 0.5
    assert all(0 <= line["frac_reward_zero_std"] < 1 and not OF_CRITIC & line.keys() for line in lines)
    assert list((tmp_path / "ppo").rglob("policy")) and not list((tmp_path / "ppo").rglob("*critic*"))
    assert "ritic" not in (tmp_path / "ppo" / "report.html").read_text() + json.dumps(summary)


def test_advantages_are_those_of_penalised_scores_over_whole_groups(ppo_config):
    """Micro-batches of 4 cut groups of 3."""
    config = ppo_config(advantage_estimator="grpo", num_generations=3, batch_size=12)
    stage, prompts = started(config)
    responses = ppo.roll_out(stage, prompts[:4])
    assert [response.row for response in responses] == [row for row in prompts[:4] for _ in range(3)]
    assert len({tuple(response.token_ids) for response in responses}) > 4
    parts = [ppo.scored(stage, part, "sft") for part in ppo.micro_batches(stage, responses)]
    for part in parts:
        part.ref_logprobs = part.logprobs - 0.5 * part.mask  # a KL of half a nat a token
    scores = torch.arange(12.0) % 5
    experience.set_rewards(parts, scores, config, kl_coef=0.1, group=None)
    experience.set_group_advantages(parts, config, stage)
    lengths = torch.tensor([float(len(response.token_ids)) for response in responses])
    expected = group_advantages(scores - 0.05 * lengths, 3, estimator="grpo")
    found = [row for part in parts for row in part.advantages]
    masks = [row for part in parts for row in part.mask]
    for advantages, mask, one in zip(found, masks, expected, strict=True):
        torch.testing.assert_close(advantages[mask], one.expand(int(mask.sum())), rtol=1e-4, atol=1e-5)
        assert not advantages[~mask].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [3, 12])
@pytest.mark.parametrize("adapters", [True, False])
def test_kl_is_0_and_ratio_1_exactly_on_the_first_mini_batch(adapters, size, dtype, ppo_config, monkeypatch, tmp_path):
    """With one micro-batch, which trains on the states of its scoring, and with several. A product of other rows may
    round differently, so every role goes through the model alone, as the policy does in the update."""
    (tmp_path / "reward.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    bare = dict(sft_adapter=None, reward_adapter=None, reward_functions=[f"{tmp_path}/reward.py:one"])
    settings = dict(advantage_estimator="rloo", num_generations=3, batch_size=12, micro_batch_size=size)
    settings |= dict(dtype=dtype, num_mini_batches=1, num_ppo_epochs=1, max_steps=1, eval_size=0)
    starts, ratios = spy_on_first_mini_batches(monkeypatch)
    passes, hidden_of = [], SharedBase.hidden_of
    monkeypatch.setattr(
        SharedBase, "hidden_of", lambda base, roles, *rest: passes.append(len(roles)) or hidden_of(base, roles, *rest)
    )
    ppo.train(ppo_config(**settings, **({} if adapters else bare)))
    assert set(passes) == {1}
    assert starts == [0.0] and ratios == [[(0.0, 1.0)] * (12 // size)]


def test_gae_takes_several_responses_too(ppo_config, tmp_path):
    ppo.train(ppo_config(num_generations=4, max_steps=1))
    (line,) = metrics(tmp_path / "ppo")
    assert line["episode"] == 8 and line.keys() > OF_CRITIC | {"frac_reward_zero_std"}


def test_an_epoch_has_each_prompt_once(ppo_config, tmp_path):
    ppo.train(ppo_config(advantage_estimator="reinforce++", num_generations=4, max_steps=None, max_samples=12))
    assert [line["episode"] for line in metrics(tmp_path / "ppo")] == [8, 16]  # of 4 prompts, 8 being held out


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_generations=1), r"--num_generations must be 2 or above with --advantage_estimator rloo.*; got 1"),
        (dict(num_generations=0), "--num_generations must be above 0; got 0"),
        (dict(num_generations=3), r"--batch_size must be a multiple of --num_generations \(3\); got 8"),
        (dict(lam=1.0), "--lam must be left at 0.95, its default, with --advantage_estimator rloo.*; got 1.0"),
        (dict(gamma=0.9), "--gamma must be left at 1.0"),
        (dict(whiten_rewards=True), "--whiten_rewards must be left at False"),
        (dict(value_clip=0.1), "--value_clip must be left at 0.2"),
        (dict(value_coef=0.2), "--value_coef must be left at 0.1"),
        (dict(advantage_estimator="ppo"), "--advantage_estimator must be one of gae, grpo"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message, ppo_config):
    config = ppo_config(**{"advantage_estimator": "rloo", "num_generations": 4})
    config.validate()
    with pytest.raises(UserError, match=message):
        replace(config, **settings).validate()


def test_reinforce_needs_no_groups(ppo_config):
    ppo_config(advantage_estimator="reinforce++", num_generations=1).validate()
