"""PPO: its known pitfalls as assertions on real (tiny) runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    Qwen2Config,
)

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase
from rlhf_fast.models.builtin import tiny_model
from rlhf_fast.ops import linear_policy_loss
from rlhf_fast.recipes import diversity, experience, ppo, ppo_report
from rlhf_fast.recipes.experience import check_first_ratio, check_start


def metrics(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "objective/kl" in line]


def spy_on_first_mini_batches(monkeypatch) -> tuple[list, list]:
    starts, ratios = [], []

    def start(experiences, dtype):
        starts.append(max(((e.logprobs - e.ref_logprobs) * e.mask).abs().max().item() for e in experiences))
        return check_start(experiences, dtype)

    def ratio(parts, dtype):
        ratios.append([(part["approx_kl"].item(), part["ratio_exact"].item()) for part in parts])
        return check_first_ratio(parts, dtype)

    real = ppo.losses

    def losses(stage, batch, tokens):
        seen = []

        def policy_loss(*args, **settings):
            result = linear_policy_loss(*args, **settings)
            seen.append(result)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(ppo, "linear_policy_loss", policy_loss)
            parts = real(stage, batch, tokens)
        return parts | {"ratio_exact": seen[0].ratio_mean}

    monkeypatch.setattr(ppo, "check_start", start)
    monkeypatch.setattr(ppo, "check_first_ratio", ratio)
    monkeypatch.setattr(ppo, "losses", losses)
    return starts, ratios


SMALL = dict(vocab_size=320, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
ARCHITECTURES = {
    "llama": None,
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, eos_token_id=1),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, eos_token_id=1),
    "gpt2": GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_positions=128, eos_token_id=1, bos_token_id=1),
    "gpt_neox": GPTNeoXConfig(**SMALL, eos_token_id=1, bos_token_id=1, attention_dropout=0.1, hidden_dropout=0.1),
}


@pytest.mark.parametrize("lora_layers", [None, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kl_is_0_and_ratio_1_exactly_on_the_first_mini_batch(name, lora_layers, ppo_config, monkeypatch, tmp_path):
    changes = {}
    if ARCHITECTURES[name] is not None:
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(ARCHITECTURES[name]).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path / name)
        # functions alone, and the bare base as the SFT model
        (tmp_path / "reward.py").write_text(
            "def length(prompts, completions):\n    return [len(c) / 9 for c in completions]\n"
        )
        changes = dict(
            model_name_or_path=str(tmp_path / name),
            sft_adapter=None,
            reward_adapter=None,
            reward_functions=[f"{tmp_path}/reward.py:length"],
        )
    starts, ratios = spy_on_first_mini_batches(monkeypatch)
    ppo.train(ppo_config(max_steps=2, lora_layers=lora_layers, **changes))
    assert starts == [0.0]
    assert len(ratios) == 2
    for parts in ratios:
        assert parts == [(0.0, 1.0)] * len(parts)


@pytest.mark.parametrize("with_model", [True, False])
def test_kl_is_0_where_one_micro_batch_is_scored_and_trained_in_one(with_model, ppo_config, monkeypatch, tmp_path):
    """In bfloat16 a product of other rows may round differently, so policy and reference need passes of one shape."""
    (tmp_path / "reward.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    changes = {} if with_model else dict(reward_adapter=None, reward_functions=[f"{tmp_path}/reward.py:one"])
    starts, ratios = spy_on_first_mini_batches(monkeypatch)
    passes = []
    hidden_of = SharedBase.hidden_of
    monkeypatch.setattr(
        SharedBase, "hidden_of", lambda base, roles, *rest: passes.append(len(roles)) or hidden_of(base, roles, *rest)
    )
    ppo.train(ppo_config(max_steps=1, dtype="bfloat16", micro_batch_size=8, num_mini_batches=1, eval_size=0, **changes))
    assert starts == [0.0] and ratios[0] == [(0.0, 1.0)]
    assert passes[:2] == [2, 2]


def test_a_policy_that_is_not_the_reference_is_refused(ppo_config, monkeypatch):
    original = ppo.add_roles

    def with_wrong_reference(stage):
        original(stage)
        return None  # not the same as the adapter switched off, see trl issue 495

    monkeypatch.setattr(ppo, "add_roles", with_wrong_reference)
    with pytest.raises(UserError, match="before the first update.*--sft_adapter"):
        ppo.train(ppo_config())


def test_training_that_disagrees_with_scoring_is_refused(ppo_config, monkeypatch):
    real = ppo.response_states
    dropped = torch.nn.functional.dropout
    monkeypatch.setattr(ppo, "response_states", lambda *args: [dropped(states, 0.1) for states in real(*args)])
    with pytest.raises(UserError, match="first mini-batch the log ratio .* dropout, padding"):
        ppo.train(ppo_config())


def test_learns_a_reward_and_the_leash_holds_it(ppo_config, tmp_path):
    (tmp_path / "reward.py").write_text(
        "def letters(prompts, completions):\n    return [sum(x == 'o' for x in c) - len(c) / 6 for c in completions]\n"
    )
    settings = dict(
        reward_adapter=None,
        reward_functions=[f"{tmp_path}/reward.py:letters"],
        batch_size=32,
        micro_batch_size=16,
        max_steps=10,
        learning_rate=2e-2,
        missing_eos_penalty=0.0,
        kl_target=None,
        seed=1,
    )
    ppo.train(ppo_config("free", kl_coef=0.0, **settings))
    ppo.train(ppo_config("leashed", kl_coef=1.0, **settings))
    free, leashed = metrics(tmp_path / "free"), metrics(tmp_path / "leashed")
    gain = [run[-1]["objective/scores"] - run[0]["objective/scores"] for run in (free, leashed)]
    assert gain[0] > 0.5
    assert gain[1] < gain[0]
    assert abs(leashed[-1]["objective/kl"]) < 0.5 * free[-1]["objective/kl"]


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_tokens_are_sampled_with_the_log_probs_that_are_trained(engine, ppo_config, tmp_path):
    ppo.train(ppo_config(rollout_engine=engine, temperature=0.7))
    for line in metrics(tmp_path / "ppo"):
        assert 0 < line["rollout/logprob_gap"] <= line["rollout/logprob_gap_max"] < 1e-4


def test_metrics_are_consistent(ppo_config, tmp_path):
    ppo.train(ppo_config(kl_target=1.0, kl_horizon=16, kl_coef=0.1))
    lines = metrics(tmp_path / "ppo")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["episode"] for line in lines] == [8, 16, 24, 32]
    assert lines[0]["objective/kl"] == 0.0
    beta = 0.1
    for line in lines:
        assert line["objective/kl_coef"] == pytest.approx(beta)
        assert line["objective/non_score_reward"] == pytest.approx(-beta * line["objective/kl"], abs=1e-6)
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/scores"] + line["objective/non_score_reward"]
        )
        assert 0 < line["response/distinct_2"] <= 1
        assert 0 <= line["response/truncated"] <= 1
        assert line["val/num_eos_tokens"] == pytest.approx(8 * (1 - line["response/truncated"]))
        assert 0 < line["policy/entropy_avg"] <= math.log(258)
        beta *= 1 + max(-0.2, min(0.2, line["objective/kl"] / 1.0 - 1)) * 8 / 16
    state = json.loads((tmp_path / "ppo" / "checkpoint-4" / "state.json").read_text())
    assert state["recipe"]["kl_coef"] == pytest.approx(beta)


def test_with_ignore_eos_every_response_is_as_long_as_asked_for(ppo_config, tmp_path):
    lengths = {}
    for ignore_eos in (False, True):
        name = f"ignore_{ignore_eos}"
        ppo.train(ppo_config(name, ignore_eos=ignore_eos, response_length=30, max_steps=2, eval_size=0))
        lengths[ignore_eos] = [line["response/length_mean"] for line in metrics(tmp_path / name)]
    assert lengths[True] == [30.0, 30.0]
    assert min(lengths[False]) < 30.0


def test_padding_and_micro_batches_change_no_experience(ppo_config):
    """Log-probs, values and scores of an episode equal those of the episode alone, unpadded."""
    config = ppo_config()
    stage, prompts = started(config)
    responses = ppo.roll_out(stage, prompts[:6])
    together = experience.score(
        stage.base, config, ppo.collate_episodes(responses, stage.base.pad_id, stage.base.device), "sft"
    )
    for i, response in enumerate(responses):
        episodes = ppo.collate_episodes([response], stage.base.pad_id, stage.base.device)
        alone = experience.score(stage.base, config, episodes, "sft")
        count = len(response.token_ids)
        for name in ("logprobs", "ref_logprobs", "values"):
            torch.testing.assert_close(
                getattr(together, name)[i, :count], getattr(alone, name)[0], rtol=1e-4, atol=1e-5
            )
            assert not getattr(together, name)[i, count:].any()
        torch.testing.assert_close(together.scores[i], alone.scores[0], rtol=1e-4, atol=1e-5)


def gradients(stage, experiences) -> dict[str, torch.Tensor]:
    tokens = torch.stack([each.mask.sum() for each in experiences]).sum()
    for each in experiences:
        ppo.losses(stage, each, tokens)
    found = {}
    for role in ("policy", "critic"):
        for name, parameter in stage.base.named_parameters(role).items():
            found[f"{role}/{name}"], parameter.grad = parameter.grad, None
    return found


def experiences_of(stage, parts, **settings) -> list:
    found = [ppo.scored(stage, part, "sft", **settings) for part in parts]
    scores = torch.arange(sum(map(len, parts)), dtype=torch.float32)
    experience.set_rewards(found, scores, stage.config, kl_coef=0.05, group=None)
    experience.set_advantages(found, stage.config, group=None)
    return found


def test_a_token_budget_changes_no_gradient(ppo_config):
    stage, prompts = started(ppo_config(micro_batch_size=None, micro_batch_tokens=100, num_mini_batches=1))
    responses = ppo.roll_out(stage, prompts[:8])
    parts = ppo.micro_batches(stage, responses)
    assert [response for part in parts for response in part] == responses
    sizes = [sum(ppo.response_lengths(part)) for part in parts]
    assert len(parts) > 1 and max(map(len, parts)) > 1 and max(sizes) <= 100
    # no part could have taken the first sequence of the next one too
    assert all(size + ppo.response_lengths(part)[0] > 100 for size, part in zip(sizes, parts[1:], strict=False))
    whole, cut = (gradients(stage, experiences_of(stage, each)) for each in ([responses], parts))
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)


def test_one_micro_batch_trains_on_the_states_of_its_scoring(ppo_config, monkeypatch):
    """The first epoch computes no forward pass, and its gradients are bit for bit those that it would compute."""
    stage, prompts = started(ppo_config(micro_batch_size=8, num_mini_batches=1))
    responses = ppo.roll_out(stage, prompts[:8])
    (computed,) = experiences_of(stage, [responses])
    (kept,) = experiences_of(stage, [responses], keep_graph=True)
    assert computed.states is None and all(states.requires_grad for states in kept.states)
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        assert getattr(kept, name).equal(getattr(computed, name)) and not getattr(kept, name).requires_grad
    expected = gradients(stage, [computed])
    monkeypatch.setattr(ppo, "response_states", None)
    found = gradients(stage, [kept])
    assert kept.states is None and all(found[name].equal(gradient) for name, gradient in expected.items())


def test_a_budget_below_one_sequence_or_beside_the_rows_is_refused(ppo_config):
    with pytest.raises(UserError, match=r"hold the longest example, of \d+ tokens; got 9: set it to \d+ or above"):
        ppo.train(ppo_config(micro_batch_size=None, micro_batch_tokens=9))
    with pytest.raises(UserError, match=r"--micro_batch_tokens must be unset where --micro_batch_size is set \(4\)"):
        ppo_config(micro_batch_tokens=9).validate()


def test_logprobs_are_those_of_a_plain_forward_at_the_temperature(ppo_config):
    config = ppo_config(temperature=0.7)
    stage, prompts = started(config)
    (response,) = ppo.roll_out(stage, prompts[:1])
    episodes = ppo.collate_episodes([response], stage.base.pad_id, stage.base.device)
    scored = experience.score(stage.base, config, episodes, "sft")
    ids = response.row.input_ids + response.token_ids
    with stage.base.role("policy"):
        logits = stage.base.model(torch.tensor([ids])).logits[0, :, : stage.base.vocab_size].double() / 0.7
    start = len(response.row.input_ids)
    expected = [logits.log_softmax(-1)[t - 1, ids[t]].item() for t in range(start, len(ids))]
    assert scored.logprobs[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_critic_and_policy_start_as_reward_model_and_sft_model(ppo_config):
    stage, _ = started(ppo_config())
    for copied, source in (("policy", "sft"), ("critic", "reward")):
        parameters = stage.base.named_parameters(source)
        copy = stage.base.named_parameters(copied)
        assert copy.keys() == parameters.keys()
        assert all(parameter.equal(copy[name]) for name, parameter in parameters.items())
    critic, reward = stage.base.heads["critic"], stage.base.heads["reward"]
    assert (critic.mean, critic.std) == (reward.mean, reward.std)


def test_the_critic_explains_returns_from_the_first_rollout_on(ppo_config, tmp_path):
    """The reward model's values of half a response must not be what the critic has to unlearn: the reward depends on
    the prompt, which a critic learns in a few steps."""
    (tmp_path / "reward.py").write_text(
        "def first(prompts, completions):\n    return [3.0 * ('dog' in p or 'cat' in p) - 6.0 for p in prompts]\n"
    )
    changes = dict(reward_functions=[f"{tmp_path}/reward.py:first"], batch_size=32, micro_batch_size=16, max_steps=6)
    ppo.train(ppo_config(**changes, eval_size=0, lam=1.0))
    found = [line["critic/explained_variance"] for line in metrics(tmp_path / "ppo")]
    assert found[0] >= -1e-6
    assert sum(found[-3:]) / 3 > 0.2


def test_only_policy_and_critic_change(ppo_config):
    stages = []
    original = ppo.add_roles

    def remembered(stage):
        reference = original(stage)
        stages.append((stage, {name: p.clone() for name, p in everything(stage).items()}))
        return reference

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "add_roles", remembered)
        ppo.train(ppo_config(max_steps=2))
    stage, before = stages[0]
    changed = {name.split("/")[0] for name, p in everything(stage).items() if not p.equal(before[name])}
    assert changed == {"policy", "critic"}


def everything(stage) -> dict[str, torch.Tensor]:
    base = stage.base
    adapters = {f"{role}/{name}": p for role in base.roles for name, p in base.named_parameters(role).items()}
    frozen = {f"base/{name}": p for name, p in base.model.named_parameters() if "lora_" not in name}
    return adapters | frozen


def test_evaluation_draws_do_not_change_training(ppo_config, tmp_path):
    ppo.train(ppo_config("often", eval_steps=1))
    ppo.train(ppo_config("seldom", eval_steps=4))
    often, seldom = metrics(tmp_path / "often"), metrics(tmp_path / "seldom")
    assert [line["objective/scores"] for line in often] == [line["objective/scores"] for line in seldom]


def test_paired_interval_by_hand():
    mean, low, high = ppo_report.paired_interval([0.0] * 4, [1.0] * 4)
    assert (mean, low, high) == (1.0, 1.0, 1.0)
    before, after = [0.0] * 100, [1.0 if i % 2 else -1.0 for i in range(100)]
    mean, low, high = ppo_report.paired_interval(before, after)
    assert mean == 0 and low == pytest.approx(-0.196, abs=0.03) and high == pytest.approx(0.196, abs=0.03)


def test_distinct_2_by_hand():
    assert diversity.distinct_2([[1, 2, 1, 2], [1, 2]]) == 2 / 4  # 12 21 12 | 12
    assert diversity.distinct_2([[5], []]) == 1.0


def test_reward_functions_get_columns_and_are_summed_with_the_model(ppo_config, tmp_path):
    (tmp_path / "f.py").write_text(
        "def a(prompts, completions, number):\n"
        "    assert all(isinstance(n, int) for n in number)\n"
        "    return [100.0] * len(prompts)\n"
        "def b(prompts, completions, **columns):\n"
        "    return [1000.0] * len(prompts)\n"
    )
    ppo.train(ppo_config(reward_functions=[f"{tmp_path}/f.py:a", f"{tmp_path}/f.py:b"], max_steps=1))
    line = metrics(tmp_path / "ppo")[0]
    assert line["objective/scores"] == pytest.approx(1100 + line["objective/reward_model"], abs=2)


def test_too_few_micro_batches_are_refused(ppo_config):
    with pytest.raises(UserError, match="--num_mini_batches 4 needs as many micro-batches.*--micro_batch_size 4"):
        ppo.train(ppo_config(num_mini_batches=4))


def started(config):
    from rlhf_fast.data import prompt_rows
    from rlhf_fast.recipes.rows import load_rows
    from rlhf_fast.recipes.stage import Stage

    stage = Stage("ppo", config)
    ppo.add_roles(stage)
    prompts, _ = load_rows(stage, prompt_rows, config.max_length - config.response_length)
    return stage, prompts
