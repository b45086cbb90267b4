"""The command line: fields as flags, the configs that reach the recipes, exit codes, and help without heavy imports."""

import dataclasses
import importlib.metadata
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

import rlhf_fast.recipes
from rlhf_fast.cli import main
from rlhf_fast.command_line import COMMANDS, OVERVIEW, PARSERS, Parser, run_parser, stage_parser
from rlhf_fast.config import STAGES, PPOConfig, RunConfig, SFTConfig, StageConfig
from rlhf_fast.errors import Interrupted, UserError

FLAGS = [(stage, f"--{item.name}") for stage, kind in STAGES.items() for item in dataclasses.fields(kind)]
RUN_FLAGS = [f"--{item.name}" for item in dataclasses.fields(StageConfig)] + ["--stages", "--config", "--debug"]
RUN_FLAGS += [f"--{stage}.{flag[2:]}" for stage, flag in FLAGS if flag != "--output_dir"]


class Recipes:
    """Replaces the recipes: records their arguments and runs ``act``."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.error: BaseException | None = None

    def __call__(self, *arguments: Any) -> dict[str, float]:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error
        return {}


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipes:
    monkeypatch.chdir(tmp_path)
    recipes = Recipes()
    for name, attribute in [*((stage, "train") for stage in STAGES), ("run", "run")]:
        module = types.ModuleType(f"rlhf_fast.recipes.{name}")
        setattr(module, attribute, lambda *arguments, name=name: recipes(name, *arguments))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(rlhf_fast.recipes, name, module, raising=False)
    merge = types.ModuleType("rlhf_fast.models.merge")
    merge.merge = lambda *arguments: recipes("merge", *arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, merge.__name__, merge)
    return recipes


@pytest.fixture(scope="module")
def help_of() -> dict[str, set[str]]:
    """Command -> the words of its help."""
    parsers = {name: stage_parser(name) for name in STAGES} | {"run": run_parser("run")}
    return {name: set(parser.format_help().split()) for name, parser in parsers.items()}


@pytest.mark.parametrize(("stage", "flag"), FLAGS)
def test_every_field_is_a_flag_of_its_stage(stage: str, flag: str, help_of: dict[str, set[str]]) -> None:
    assert flag in help_of[stage]


@pytest.mark.parametrize("flag", RUN_FLAGS)
def test_every_field_is_a_flag_of_a_run(flag: str, help_of: dict[str, set[str]]) -> None:
    assert flag in help_of["run"]


def test_a_stage_cannot_be_sent_elsewhere_in_a_run(help_of: dict[str, set[str]]) -> None:
    assert "--ppo.output_dir" not in help_of["run"]


def test_help_shows_the_text_and_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--lam NUMBER GAE's lambda. [0.95]" in text
    assert "--kl_estimator k1|k2|k3|abs Estimator of the per-token KL in the reward. [k1]" in text
    assert "--whiten_rewards [true|false]" in text
    assert "--lora_target_modules A,B Names of the modules that get an adapter;" in text and "[all-linear]" in text
    assert main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--ppo.learning_rate NUMBER --learning_rate, here alone. [0.0001]" in text


def test_help_may_hold_a_percent_sign() -> None:
    parser = Parser("sft")
    parser.flag(parser, "share", "10% of it.")
    assert "10% of it." in parser.format_help()


# ---- what reaches the recipes


def test_a_stage_gets_its_config(recipes: Recipes) -> None:
    Path("sft.yaml").write_text("lora_r: 4\nseed: 3\n")
    argv = "sft --config sft.yaml --seed 5 --output_dir out --trust_remote_code --rename_columns a=prompt"
    assert main([*argv.split(), "--allow_pickle_weights", "false", "--report_to=wandb"]) == 0
    [(name, config)] = recipes.calls
    expected = SFTConfig(dataset_name="demo/sft", output_dir="out", lora_r=4, seed=5, trust_remote_code=True)
    assert (name, config) == (
        "sft",
        dataclasses.replace(expected, rename_columns={"a": "prompt"}, report_to=["wandb"]),
    )


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_calls_its_own_recipe(stage: str, recipes: Recipes) -> None:
    reward = ["--reward_functions", "gold.py:score"] if stage == "ppo" else []
    assert main([stage, "--output_dir", "out", *reward]) == 0
    [(name, config)] = recipes.calls
    assert name == stage and type(config) is STAGES[stage]


def test_a_run_gets_shared_and_stage_flags(recipes: Recipes) -> None:
    argv = "run --output_dir out --lora_r 4 --ppo.lora_r 8 --ppo.kl_target null --ppo.whiten_rewards"
    assert main([*argv.split(), "--stages", "reward,ppo"]) == 0
    [(name, config)] = recipes.calls
    assert name == "run" and isinstance(config, RunConfig)
    assert (config.sft.lora_r, config.reward.lora_r, config.ppo.lora_r) == (4, 4, 8)
    assert isinstance(config.ppo, PPOConfig) and config.ppo.kl_target is None and config.ppo.whiten_rewards
    assert config.stages == ["reward", "ppo"]


def test_merge(recipes: Recipes) -> None:
    assert main("merge --adapter a --output_dir b".split()) == 0
    assert main("merge --adapter a --output_dir b --dtype float16".split()) == 0
    assert recipes.calls == [("merge", "a", "b", None), ("merge", "a", "b", "float16")]


def test_plan_takes_a_stage_or_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    planned: list[Any] = []
    monkeypatch.setattr("rlhf_fast.recipes.plan.plan", planned.append)
    assert main("plan sft --batch_size 3 --output_dir a".split()) == 0
    assert main("plan run --output_dir b --stages reward,ppo".split()) == 0
    assert [type(config).__name__ for config in planned] == ["SFTConfig", "RewardConfig", "PPOConfig"]
    assert planned[0].batch_size == 3 and planned[2].sft_adapter is None
    assert planned[2].reward_adapter == "b/reward/adapter"
    assert main("plan --config ppo.yaml".split()) == 2
    assert "plan ppo --FLAG" in capsys.readouterr().err


# ---- mistakes


def unknown(command: str, flag: str, near: str) -> str:
    return f"unknown flag {flag} (did you mean {near!r}?); rlhf-fast {command} --help lists the flags"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            "pop",
            f"unknown command 'pop' (did you mean 'ppo'?); the commands are {', '.join(COMMANDS)}",
        ),
        ("ppo --kl_coeff 1", unknown("ppo", "--kl_coeff", "--kl_coef")),
        ("ppo --kl_coeff=1", unknown("ppo", "--kl_coeff", "--kl_coef")),
        ("sft --learning 1", unknown("sft", "--learning", "--learning_rate")),
        ("run --ppo.lan 1", unknown("run", "--ppo.lan", "--ppo.lam")),
        ("run --ppo.output_dir x", unknown("run", "--ppo.output_dir", "--output_dir")),
        ("sft run.yaml", "unexpected 'run.yaml': settings are given as --FLAG VALUE, a file as --config FILE"),
        ("sft --seed", "argument --seed: expected one argument"),
        ("sft --seed x", "--seed must be a whole number; got 'x'"),
        ("sft --trust_remote_code maybe", "--trust_remote_code must be true or false; got 'maybe'"),
        ("sft --config nope.yaml", "nope.yaml: no such config file"),
        ("merge --adapter a", "the following arguments are required: --output_dir"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    argv: str, expected: str, recipes: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv.split()) == 2
    assert capsys.readouterr() == ("", f"rlhf-fast: error: {expected}\n")
    assert recipes.calls == []


TRAIN = ["sft", "--output_dir", "out"]


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("no column 'prompt'"), 2, "rlhf-fast: error: no column 'prompt'\n"),
        (
            MemoryError("full"),
            2,
            "rlhf-fast: error: out of memory: lower --micro_batch_size or --max_length, or take a smaller model "
            "(MemoryError: full; --debug shows where)\n",
        ),
        (Interrupted("Stopped at step 3. Go on with ..."), 130, "Stopped at step 3. Go on with ...\n"),
        (KeyboardInterrupt(), 130, "rlhf-fast: interrupted\n"),
    ],
)
def test_errors_of_a_recipe(
    error: BaseException, code: int, expected: str, recipes: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes.error = error
    assert main(TRAIN) == code
    assert capsys.readouterr() == ("", expected)


def test_an_unexpected_error_prints_its_traceback_and_ends_with_one_line(
    recipes: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes.error = RuntimeError("two\nlines")
    assert main(TRAIN) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback (most recent call last)") and "in __call__" in text
    assert text.splitlines()[-1] == ("rlhf-fast: internal error: RuntimeError: two lines (the traceback is above)")


@pytest.mark.parametrize("error", [UserError("it is wrong"), MemoryError("it is wrong")])
def test_debug_shows_the_traceback_of_a_mistake(
    error: Exception, recipes: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes.error = error
    assert main([*TRAIN, "--debug"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback (most recent call last)")
    assert "it is wrong" in text.splitlines()[-1]


def test_debug_reaches_no_config(recipes: Recipes) -> None:
    assert main([*TRAIN, "--debug"]) == 0
    assert len(recipes.calls) == 1


# ---- overview, version, speed


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_overview_has_an_example_of_each_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  rlhf-fast {command} " in text
    assert len(text.splitlines()) < 24


def test_the_flags_of_the_overview_exist() -> None:
    for line in OVERVIEW.replace("\\\n", " ").splitlines():
        words = line.split()
        if words[:1] == ["rlhf-fast"] and words[1] in COMMANDS:
            if words[1] == "doctor":  # takes a YAML
                continue
            command = words[2] if words[1] == "plan" else words[1]
            flags = PARSERS[command](command).flags
            assert {word for word in words if word.startswith("--")} <= set(flags)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"rlhf-fast": "1.2.3"}.__getitem__)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "rlhf-fast 1.2.3\n"

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(["--version"]) == 2
    assert "this checkout is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code"), [(["run", "--help"], 0), (["bench", "--help"], 0), (["sft", "--lora_rr", "1"], 2), (["ppo"], 2)]
)
def test_help_and_mistakes_answer_at_once_without_heavy_imports(argv: list[str], code: int) -> None:
    script = (
        "import sys; from rlhf_fast.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert time.perf_counter() - start < 2.0
