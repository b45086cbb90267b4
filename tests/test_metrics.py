"""Metrics: what the recipes log is declared, what is declared is logged and charted, and the docs say the same."""

import json
from pathlib import Path

import pytest
from command_lines import OWN, arguments, write_data

from rlhf_fast import metrics
from rlhf_fast.cli import main
from rlhf_fast.metrics import METRICS, Metric
from rlhf_fast.monitor.panels import stage_panels
from rlhf_fast.monitor.runs import Stage as LoggedStage
from rlhf_fast.recipes.stage import Stage

FUNCTIONS = """
def gold(completions, **columns):
    return [float(len(text)) for text in completions]

def tells(completions, log_metric, **columns):
    log_metric("my own/figure", 1.0)
    return [0.5] * len(completions)
"""
FLAGS = {
    "sft": [""],
    "reward": ["--label_noise_ceiling 0.9"],
    "dpo": [""],
    "ppo": [
        "--eval_functions functions.py:gold --reward_functions functions.py:tells --num_generations 2",
        "--reward_adapter null --reward_functions functions.py:gold",
    ],
}


@pytest.fixture(scope="module")
def logged(tiny_adapters, tmp_path_factory) -> dict[str, list[dict]]:
    """Stage -> the lines of metrics.jsonl of small runs that between them have every metric."""
    folder = tmp_path_factory.mktemp("logged")
    lines: dict[str, list[dict]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_data(folder)
        Path("functions.py").write_text(FUNCTIONS)
        for stage in OWN:
            for number, flags in enumerate(FLAGS[stage]):
                out = f"{stage}{number}"
                assert main([*arguments(stage, flags, tiny_adapters), "--output_dir", out]) == 0
                found = (folder / out / "metrics.jsonl").read_text().splitlines()
                lines.setdefault(stage, []).extend(map(json.loads, found))
    return lines


@pytest.mark.parametrize("stage", METRICS)
def test_what_is_logged_is_what_is_declared(stage, logged):
    names = {name for line in logged[stage] for name in line} - {"step", "my own/figure"}
    declared = {metric: metric.named_by if metric.is_family else metric.name.__eq__ for metric in METRICS[stage]}
    assert [name for name in names if not any(fits(name) for fits in declared.values())] == []
    assert [metric.name for metric, fits in declared.items() if not any(map(fits, names))] == []


def test_what_functions_log_keeps_its_own_name(logged):
    assert any("my own/figure" in line for line in logged["ppo"])


@pytest.mark.parametrize("stage", METRICS)
def test_every_declared_chart_is_drawn_from_what_is_logged(stage, logged):
    panels = stage_panels([LoggedStage(stage, logged[stage])])
    drawn = {drawing.title: drawing.description for panel in panels for drawing in panel.drawings}
    titles = [chart.title.format(name="gold") for chart in metrics.charts(stage)]
    assert [title for title in titles if title not in drawn] == []
    for metric in METRICS[stage]:
        title = metric.chart.title.format(name="gold") if metric.chart else ""
        assert metric.chart is None or not metric.label or metric.label in drawn[title], metric.name


@pytest.mark.parametrize("metric", [Metric("los", "", ""), metrics.KL, metrics.EVAL_FUNCTION.of("gold")])
def test_an_undeclared_metric_is_an_error(metric):
    with pytest.raises(ValueError, match=f"sft logs .*{metric.name}.*rlhf_fast/metrics.py"):
        metrics.declared("sft", metric)


def test_a_stage_logs_declared_metrics_alone(monkeypatch, command):
    real = Stage.log

    def log(stage, step, values, **others):
        return real(stage, step, {**values, Metric("surprise", "", ""): 1.0}, **others)

    monkeypatch.setattr(Stage, "log", log)
    outcome = command("sft")
    assert outcome.code == 1 and "surprise" in outcome.err


def test_names_are_unique_and_families_are_named_by_their_function():
    for stage, declared in METRICS.items():
        names = [metric.name for metric in declared]
        assert len(set(names)) == len(names), stage
    assert metrics.REWARD_MEAN.of("a/b").name == "rewards/a/b/mean"
    assert metrics.REWARD_MEAN.named_by("rewards/a/b/mean") == "a/b"
    assert metrics.REWARD_MEAN.named_by("rewards/abstained") is None
    assert metrics.KL.named_by("objective/kl") is None


def test_the_reserved_names_are_those_of_the_runs_own_metrics():
    assert metrics.RESERVED == {
        "kl",
        "kl_coef",
        "kl_target",
        "entropy",
        "scores",
        "scores_std",
        "score_length_correlation",
        "reward_model",
        "reward_model_std",
        "non_score_reward",
        "rlhf_reward",
    }


def test_the_docs_list_them():
    path = Path(__file__).parents[1] / "docs" / "metrics.md"
    assert path.read_text(encoding="utf-8") == metrics.markdown(), "make it again: see its first lines"
