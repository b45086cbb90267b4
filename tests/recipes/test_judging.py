"""Reward functions in whole PPO runs: weights, abstaining, metrics, limits, exits and messages."""

import json
import statistics
from pathlib import Path

import pytest

from rlhf_fast.checkpoint import damage, list_checkpoints
from rlhf_fast.cli import main
from rlhf_fast.errors import UserError
from rlhf_fast.recipes import ppo

FUNCTIONS = """
import sys, time
calls = {}

def counted(name):
    calls[name] = calls.get(name, 0) + 1
    return calls[name]

def length(completions, **kwargs):
    return [len(c) for c in completions]

def even(prompts, completions, number):
    return [None if n % 2 else 10.0 for n in number]

def silent(completions, **kwargs):
    return [None] * len(completions)

def tells(completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    print("step", trainer_state.global_step, "of", trainer_state.max_steps)
    log_extra("ids", completion_ids)
    log_metric("my/steps", trainer_state.global_step)
    return [float(len(ids)) for ids in completion_ids]

def clashes(completions, log_metric, **kwargs):
    log_metric("objective/kl", 1)
    return [0.0] * len(completions)

def leaves(completions, **kwargs):
    if counted("leaves") > 3: sys.exit(0)
    return [0.0] * len(completions)

def hangs(completions, **kwargs):
    if counted("hangs") > 3: time.sleep(1000)
    return [0.0] * len(completions)

def huge(completions, **kwargs):
    return [1e300] * len(completions)

def needs(completions, solution, **kwargs):
    raise AssertionError("called")
"""


@pytest.fixture
def functions_config(ppo_config, tmp_path):
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)

    def config(*names, **changes):
        alone = dict(reward_adapter=None, missing_eos_penalty=0.0, max_steps=2, save_steps=1)
        return ppo_config(**{**alone, "reward_functions": [f"{path}:{name}" for name in names], **changes})

    return config


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def steps(folder: Path) -> list[dict]:
    return [line for line in lines(folder) if "objective/kl" in line]


def test_each_function_has_its_mean_and_spread_and_weights_make_the_sum(functions_config, tmp_path):
    ppo.train(functions_config("length", "even", reward_weights=[0.5, -2.0]))
    for line in steps(tmp_path / "ppo"):
        assert line["rewards/even/mean"] == 10 and line["rewards/even/std"] == 0  # without abstentions
        assert line["rewards/length/std"] > 0
    samples = [row for row in lines(tmp_path / "ppo", "samples.jsonl") if row["split"] == "train"]
    assert {row["why"] for row in samples} >= {"highest_score", "highest_kl"}
    scores = {(-20.0 if even else 0.0) + 0.5 * len(row["response"]) for row in samples for even in (True, False)}
    assert all(min(abs(row["score"] - score) for score in scores) < 1e-4 for row in samples)
    assert {row["score"] < -15 for row in samples} == {True, False}  # some were judged by both, some by one


def test_means_and_spreads_by_hand(functions_config, tmp_path, monkeypatch):
    seen = []
    original = ppo.roll_out
    monkeypatch.setattr(ppo, "roll_out", lambda *args: seen.append(original(*args)) or seen[-1])
    ppo.train(functions_config("length"))
    for responses, line in zip(seen, steps(tmp_path / "ppo"), strict=True):
        lengths = [len(response.text) for response in responses]
        assert line["rewards/length/mean"] == pytest.approx(statistics.mean(lengths))
        assert line["rewards/length/std"] == pytest.approx(statistics.stdev(lengths))
        assert line["objective/scores"] == pytest.approx(statistics.mean(lengths))
        assert line["rewards/abstained"] == 0


def test_where_all_functions_abstain_the_reward_is_0_and_is_counted_and_said_once(functions_config, tmp_path, capsys):
    ppo.train(functions_config("silent", eval_functions=[f"{tmp_path}/functions.py:silent"]))
    assert capsys.readouterr().err.count("every reward function abstained (None) from 8 of 8 responses") == 1
    for line in steps(tmp_path / "ppo"):
        assert line["rewards/abstained"] == 1 and line["objective/scores"] == 0
        assert line["rewards/silent/mean"] is None and line["objective/silent"] is None  # NaN in JSON
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())["figures"]
    assert "scores_gain" in summary and "silent_gain" not in summary


def test_an_eval_function_may_abstain_from_some(functions_config, tmp_path):
    ppo.train(functions_config("length", eval_functions=[f"{tmp_path}/functions.py:even"]))
    figures = json.loads((tmp_path / "ppo" / "summary.json").read_text())["figures"]
    assert figures["even_sft"] == figures["even_ppo"] == 10
    assert all(line["objective/even"] == 10 for line in steps(tmp_path / "ppo"))
    golds = [row["gold"] for row in lines(tmp_path / "ppo", "samples.jsonl") if row["split"] == "eval"]
    assert set(golds) == {None, 10.0}


def test_what_a_function_prints_and_logs_is_kept(functions_config, tmp_path, capsys):
    ppo.train(functions_config("tells"))
    out, err = capsys.readouterr()
    assert "step 0 of 2\n" in err and "step 1 of 2\n" in err and "step" not in out.split("figure")[0]
    assert [line["my/steps"] for line in steps(tmp_path / "ppo")] == [0, 1]
    for row in lines(tmp_path / "ppo", "samples.jsonl"):
        if row["split"] == "train":
            ids = json.loads(row["extra"]["ids"])
            assert len(ids) == row["score"] and (ids[-1] == 1) == row["stopped"]


def test_a_metric_named_like_the_runs_own_is_refused(functions_config):
    with pytest.raises(UserError, match="log_metric.'objective/kl'.: the run has a metric of that name"):
        ppo.train(functions_config("clashes"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("leaves", "raised SystemExit: 0 .*functions.py, line"),
        ("hangs", "was still running after 1.5 seconds .*functions"),
    ],
)
def test_a_function_that_exits_or_hangs_stops_the_run_with_its_last_step_kept(functions_config, tmp_path, name, said):
    with pytest.raises(UserError, match=f"reward function {name} {said}"):
        ppo.train(functions_config(name, max_steps=4, save_steps=4, reward_timeout=1.5))
    (checkpoint,) = list_checkpoints(tmp_path / "ppo")
    assert checkpoint.name == "checkpoint-2" and damage(checkpoint) is None


def test_the_exit_code_of_a_function_that_exits_with_0_is_2(functions_config, tmp_path, capsys):
    from rlhf_fast.config_load import dump_yaml

    dump_yaml(functions_config("leaves"), tmp_path / "config.yaml")
    assert main(["ppo", "--config", str(tmp_path / "config.yaml"), "--max_steps", "4"]) == 2
    assert "rlhf-fast: error: reward function leaves raised SystemExit: 0" in capsys.readouterr().err


def test_a_huge_reward_is_blamed_on_its_function(functions_config, tmp_path):
    with pytest.raises(UserError, match="reward function huge must return numbers from -1e.12 to 1e.12; got 1e.300"):
        ppo.train(functions_config("huge"))
    with pytest.raises(UserError, match="reward function even: 10.0 for completion .*--reward_weights"):
        ppo.train(functions_config("even", reward_weights=[1e12], overwrite_output_dir=True))


@pytest.mark.parametrize("kind", ["reward_functions", "eval_functions"])
def test_a_column_that_is_missing_is_told_before_anything_is_sampled(functions_config, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("rlhf_fast.recipes.ppo_report.generate", lambda *args, **kwargs: pytest.fail("sampled"))
    names = {"reward_functions": [f"{tmp_path}/functions.py:length"], kind: [f"{tmp_path}/functions.py:needs"]}
    with pytest.raises(UserError, match="reward function needs needs 'solution', .* there are number .and prompts"):
        ppo.train(functions_config(**names))


def test_a_column_named_like_an_argument_is_told_before_anything_is_sampled(functions_config, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_fast.recipes.ppo_report.generate", lambda *args, **kwargs: pytest.fail("sampled"))
    with pytest.raises(UserError, match="^the data has a column 'completions', .*--rename_columns completions="):
        ppo.train(functions_config("length", rename_columns={"number": "completions"}))


def test_a_function_that_seeds_does_not_change_what_is_sampled(functions_config, tmp_path):
    (tmp_path / "seeds.py").write_text(
        "import torch, random, numpy\ndef length(completions, **kwargs):\n"
        "    torch.manual_seed(0); random.seed(0); numpy.random.seed(0)\n    return [len(c) for c in completions]\n"
    )
    ppo.train(functions_config("length"))
    ppo.train(functions_config(reward_functions=[f"{tmp_path}/seeds.py:length"], output_dir=str(tmp_path / "seeds")))
    kinds = ("step", "objective/scores", "objective/kl", "grad_norm")
    plain, seeding = ([[line[k] for k in kinds] for line in steps(tmp_path / name)] for name in ("ppo", "seeds"))
    assert plain == seeding
