"""YAML and flags -> configs: precedence, wiring, types, the exact words of each error, and the round trip."""

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.config import STAGES, PPOConfig, RewardConfig, RunConfig, SFTConfig
from rlhf_fast.config_load import dump_yaml, load_run, load_stage
from rlhf_fast.config_values import field_kinds, read_settings
from rlhf_fast.errors import UserError

FIELDS = [(stage, item) for stage, kind in STAGES.items() for item in dataclasses.fields(kind)]
FIELD_IDS = [f"{stage}.{item.name}" for stage, item in FIELDS]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "run.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def message(stage: str, yaml_path: str | None, **flags: Any) -> str:
    """The error of loading a stage, or of a run for stage "run"."""
    with pytest.raises(UserError) as caught:
        load_run(yaml_path, flags) if stage == "run" else load_stage(stage, yaml_path, flags)
    return str(caught.value)


# ---- the config classes


@pytest.mark.parametrize(("stage", "item"), FIELDS, ids=FIELD_IDS)
def test_every_field_has_a_help_text_and_a_type_that_text_can_set(stage: str, item: dataclasses.Field[Any]) -> None:
    assert re.fullmatch(r"\S.*\.", item.metadata["help"]), "one line, ending in a full stop"
    text = {
        int: "3",
        float: "0.5",
        str: "a",
        bool: "true",
        list[str]: "a,b",
        list[float]: "1,0.5",
        dict[str, str]: "a=b",
        dict[str, float]: "a=0.5",
    }
    expected = {int: 3, float: 0.5, str: "a", bool: True}
    expected |= {
        list[str]: ["a", "b"],
        list[float]: [1.0, 0.5],
        dict[str, str]: {"a": "b"},
        dict[str, float]: {"a": 0.5},
    }
    kinds = field_kinds(STAGES[stage])
    for kind in text:
        if kinds[item.name] in (kind, kind | None):
            value = read_settings({item.name: text[kind]}, kinds, "--")[item.name]
            assert value == expected[kind] and type(value) is type(expected[kind])
            break
    else:
        pytest.fail(f"no text for a field of type {kinds[item.name]}")


ORDER = "must be some of sft, reward, dpo, ppo, each once and in this order"
MAPPING = "must be a mapping of text to text (as a flag: old=new,old2=new2)"
VALID = {"output_dir": "out", "dataset_name": "x.jsonl"}


@pytest.mark.parametrize(
    ("stage", "flags", "expected"),
    [
        ("sft", {"lora_r": 0}, "--lora_r must be above 0; got 0"),
        ("sft", {"max_steps": 0}, "--max_steps must be above 0, or unset; got 0"),
        ("sft", {"lora_dropout": 1.0}, "--lora_dropout must be from 0 to below 1; got 1.0"),
        ("sft", {"dtype": "int8"}, "--dtype must be one of auto, float32, bfloat16, float16; got 'int8'"),
        ("sft", {"report_to": "mlflow"}, "--report_to must be tensorboard, wandb or both; got ['mlflow']"),
        ("sft", {"dataset_name": ""}, "--dataset_name must be set: a file, a folder, a hub name or demo/NAME; got ''"),
        ("sft", {"output_dir": ""}, "--output_dir must be set: the folder to write to; got ''"),
        ("sft", {"patience": 0}, "--patience must be above 0; got 0"),
        ("sft", {"seed": -1}, "--seed must be from 0 to 4294967295; got -1"),
        ("sft", {"seed": 2**32}, "--seed must be from 0 to 4294967295; got 4294967296"),
        ("sft", {"lora_target_modules": ""}, "--lora_target_modules must be names of modules, or all-linear; got []"),
        ("sft", {"lora_alpha": "inf"}, "--lora_alpha must be a finite number; got 'inf'"),
        ("sft", {"lora_alpha": 1e300}, "--lora_alpha must be a finite number of float32; got 1e+300"),
        ("sft", {"run_name": "a\0b"}, "--run_name must be text without the character NUL or null; got 'a\\x00b'"),
        ("sft", {"max_steps": 10**5000}, "--max_steps must be a whole number of at most 31 digits or null; got a num"),
        ("sft", {"output_dir": "~nobody-here/a"}, "--output_dir '~nobody-here/a': no home folder is known for '~nobo"),
        ("reward", {"calibration_prompts": 1}, "a standard deviation needs two samples; got 1"),
        ("reward", {"label_noise_ceiling": 0.4}, "--label_noise_ceiling must be from 0.5 to 1; got 0.4"),
        ("ppo", {}, "PPO needs a reward: set --reward_adapter FOLDER, --reward_functions FILE.py:NAME, or both"),
        ("ppo", {"reward_functions": "a.py:f", "batch_size": 64, "num_mini_batches": 3}, "a multiple of --num_mini_b"),
        ("ppo", {"reward_functions": "a.py:f", "response_length": 512}, "must be below --max_length (512), which"),
        (
            "ppo",
            {"reward_functions": "a.py:f", "reward_weights": "1,2"},
            "be one number a reward function: 1; got [1.0, 2.0]",
        ),
        (
            "ppo",
            {"reward_functions": "a.py:f", "reward_weights": "1,x"},
            "be a list of finite numbers (as a flag: 1.0,0.5)",
        ),
        (
            "ppo",
            {"reward_functions": "a.py:f", "reward_timeout": 0},
            "--reward_timeout must be above 0 and at most 1e+08",
        ),
        ("ppo", {"reward_functions": "a.py:f", "lam": 1.1}, "--lam must be from 0 to 1; got 1.1"),
    ],
)
def test_loading_validates(stage: str, flags: dict[str, Any], expected: str) -> None:
    assert expected in message(stage, None, **(VALID | flags))


def test_a_config_made_in_python_is_held_to_the_same() -> None:
    for changes in ({"lora_alpha": float("inf")}, {"learning_rate": float("nan")}, {"seed": -1}):
        with pytest.raises(UserError, match=f"--{next(iter(changes))} must be"):
            SFTConfig(**VALID, **changes).validate()  # type: ignore[arg-type]


# ---- one stage


def test_defaults_then_yaml_then_flags() -> None:
    path = write("output_dir: out\ndataset_name: data.jsonl\nlearning_rate: 0.5\nlora_r: 4\n", "sft.yaml")
    config = load_stage("sft", path, {"learning_rate": "1e-3"})
    assert isinstance(config, SFTConfig)
    assert (config.learning_rate, config.lora_r, config.lora_alpha, config.output_dir) == (1e-3, 4, 32.0, "out")


def test_numbers_that_yaml_takes_for_text() -> None:
    config = load_stage("sft", write("learning_rate: 1e-4\nadam_epsilon: 1.e-9\nweight_decay: 1\noutput_dir: out"), {})
    assert (config.learning_rate, config.adam_epsilon, config.weight_decay) == (1e-4, 1e-9, 1.0)
    assert isinstance(config.weight_decay, float)


def test_null_unsets_an_optional_field_from_yaml_and_flags() -> None:
    path = write("output_dir: out\nreward_functions: [a.py:f]\nkl_target: null\n")
    assert load_stage("ppo", path, {}).kl_target is None  # type: ignore[attr-defined]
    assert load_stage("ppo", path, {"kl_target": "3"}).kl_target == 3.0  # type: ignore[attr-defined]
    assert load_stage("ppo", path, {"max_steps": "null"}).max_steps is None


def test_lists_and_mappings_from_yaml_and_flags() -> None:
    path = write("output_dir: out\nreport_to: [wandb]\nrename_columns: {question: prompt}\nlora_target_modules: q, v\n")
    config = load_stage("sft", path, {})
    assert config.report_to == ["wandb"]
    assert config.rename_columns == {"question": "prompt"}
    assert config.lora_target_modules == ["q", "v"]
    config = load_stage("sft", path, {"report_to": "tensorboard,wandb", "rename_columns": "a=prompt, b=completion"})
    assert config.report_to == ["tensorboard", "wandb"]
    assert config.rename_columns == {"a": "prompt", "b": "completion"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: abc", "learning_rate must be a number; got 'abc'"),
        ("learning_rate: true", "learning_rate must be a number; got True"),
        ("learning_rate: .nan", "learning_rate must be a finite number; got nan"),
        ("learning_rate: null", "learning_rate must be a number; got null"),
        ("lora_r: 1.5", "lora_r must be a whole number; got 1.5"),
        ("lora_r: true", "lora_r must be a whole number; got True"),
        ("max_steps: [1]", "max_steps must be a whole number or null; got [1]"),
        ("trust_remote_code: 1", "trust_remote_code must be true or false; got 1"),
        ("run_name: 7", "run_name must be text (in quotes where it looks like a number) or null; got 7"),
        ("report_to: [1]", "report_to must be a list of texts (as a flag: a,b); got [1]"),
        ("rename_columns: {a: 1}", f"rename_columns {MAPPING}; got"),
        ("rename_columns: ab", f"rename_columns {MAPPING}; got 'ab'"),
        ("learning_rat: 1", "unknown key 'learning_rat' (did you mean 'learning_rate'?)"),
        ("zzzzzz: 1", "unknown key 'zzzzzz'"),
        ("1: 1", "unknown key '1'"),
        ("- a", "must hold settings as `name: value` lines; got ['a']"),
        ("run_name: 2026-13-01", "not valid YAML: month must be in 1..12; put text that looks like a date in quotes"),
    ],
)
def test_a_wrong_yaml_names_file_key_and_value(text: str, expected: str) -> None:
    assert message("sft", write(text, "bad.yaml")).startswith(f"bad.yaml: {expected}")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("lora_r: 4\nlearning_rate: [1\nseed: 1\n", "bad.yaml, line 3, column 5: not valid YAML: "),
        ("lora_r: 4\nseed: 1\n  batch_size: 3\n", "bad.yaml, line 3, column 13: not valid YAML: mapping values are"),
        ("lora_r: 4\n\nlora_r: 5\n", "bad.yaml, line 3, column 1: not valid YAML: the key 'lora_r' twice"),
        ("lora_r: 4\nrun_name: a\x07b\n", "bad.yaml, line 2, column 12: not valid YAML: the character '\\x07' is not"),
    ],
)
def test_a_syntax_error_names_file_line_and_column(text: str, where: str) -> None:
    assert message("sft", write(text, "bad.yaml")).startswith(where)


def test_a_file_that_cannot_be_read() -> None:
    write("", "configs/small.yaml")
    assert message("sft", "configs/smal.yaml") == (
        "configs/smal.yaml: no such config file (did you mean 'small.yaml'?)"
    )
    assert message("sft", "nowhere/a.yaml") == "nowhere/a.yaml: no such config file"
    assert message("sft", "configs") == "configs: the config file cannot be read: Is a directory"
    Path("latin.yaml").write_bytes("lora_r: 4\nrun_name: é\n".encode("latin-1"))
    assert message("sft", "latin.yaml") == "latin.yaml: line 2 is not UTF-8 text; save the file as UTF-8"


def bomb(key: str) -> str:
    levels = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    return f"a: &a [x, x, x, x, x, x, x, x, x]\n{levels}{key}: *i\n"


MERGES = "a: &a {k0: 1}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for i, before in enumerate(["a", *(f"m{i}" for i in range(30))])
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 3000, "line 1, column 51: not valid YAML: nested more than 50 deep"),
        ("a:\n" + "".join(" " * i + "- \n" for i in range(1, 90)), "not valid YAML: nested more than 50 deep"),
        (bomb("batch_size"), "not valid YAML: more than 10000 values, aliases included"),
        (bomb("unknown"), "not valid YAML: more than 10000 values, aliases included"),
        (MERGES, "not valid YAML: more than 10000 values, aliases included"),
        ("batch_size: &a [*a]", "not valid YAML: an alias inside what it stands for"),
        ("batch_size: " + "x" * 100_000, "batch_size must be a whole number; got 'xxx"),
        (f"? {'k' * 1000}\n: 1", "unknown key 'kkk"),
        (
            "max_steps: 0x" + "f" * 6000,
            "max_steps must be a whole number of at most 31 digits or null; got a number of",
        ),
        ('batch_size: !!int ""', "a value is not of the type that its !!tag names"),
        ("batch_size: !!bool maybe", "a value is not of the type that its !!tag names"),
        ("batch_size: !!timestamp x", "a value is not of the type that its !!tag names"),
        ("x" * 1_000_001, "more than 1,000,000 bytes, so no settings file"),
    ],
)
def test_a_yaml_without_end_is_one_bounded_line(text: str, expected: str) -> None:
    for stage in ("sft", "run"):
        said = message(stage, write(text, "bad.yaml"))
        assert expected in said and len(said) < 500 and "\n" not in said


def test_home_folders_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    paths = ["output_dir", "dataset_name", "eval_dataset_name", "model_name_or_path", "resume_from_checkpoint"]
    paths += ["sft_adapter", "reward_adapter", "chat_template"]
    settings = {name: f"~/{name}" for name in paths} | {"reward_functions": ["~/f.py:name"], "eval_functions": ["m:f"]}
    lists = {name: ",".join(value) for name, value in settings.items() if isinstance(value, list)}
    write(yaml.safe_dump(settings), "home/ppo.yaml")
    sections = {name: settings.pop(name) for name in ("reward_functions", "eval_functions", *paths[5:7])}
    write(yaml.safe_dump({**settings, "ppo": sections}), "home/run.yaml")
    flags = settings | sections | lists
    for config in (load_stage("ppo", "~/ppo.yaml", {}), load_stage("ppo", None, flags), load_run("~/run.yaml", {}).ppo):
        for name in paths[1:]:
            assert getattr(config, name) == f"{home}/{name}"
        assert config.output_dir.startswith(f"{home}/output_dir")
        assert config.reward_functions == [f"{home}/f.py:name"]  # type: ignore[attr-defined]
        assert config.eval_functions == ["m:f"]  # type: ignore[attr-defined]
    assert load_stage("sft", None, VALID | {"chat_template": "~{{ x }}"}).chat_template == "~{{ x }}"


def test_wrong_flags_are_named_as_flags() -> None:
    assert message("sft", None, lora_rr="4") == "unknown flag --lora_rr (did you mean '--lora_r'?)"
    assert message("sft", None, lora_r="four") == "--lora_r must be a whole number; got 'four'"
    for text in ("a", "a=", "=b", "a=b,c"):
        assert message("sft", None, rename_columns=text) == f"--rename_columns {MAPPING}; got {text!r}"
    assert message("run", None, **{"ppo.lam": "x"}) == "--ppo.lam must be a number; got 'x'"
    assert message("run", None, **{"ppo.lan": "1"}) == "unknown flag --ppo.lan (did you mean '--ppo.lam'?)"


def test_demo_data_for_the_default_model_alone() -> None:
    assert load_stage("sft", None, {"output_dir": "out"}).dataset_name == "demo/sft"
    assert load_stage("reward", None, {"output_dir": "out"}).dataset_name == "demo/preferences"
    ppo = load_stage("ppo", None, {"output_dir": "out", "reward_functions": "a.py:f"})
    assert (ppo.dataset_name, ppo.eval_dataset_name) == ("demo/prompts", "demo/prompts-eval")
    own = {"output_dir": "out", "reward_functions": "a.py:f", "dataset_name": "mine.jsonl"}
    assert load_stage("ppo", None, own).eval_dataset_name is None
    assert message("sft", None, output_dir="out", model_name_or_path="gpt2").startswith("--dataset_name must be set")


def test_paths_of_a_yaml_are_found_from_here_and_else_from_its_folder() -> None:
    for name in ("there/data.jsonl", "there/both.jsonl", "both.jsonl", "there/gold.py", "there/chat.jinja"):
        write("", name)
    path = write(
        "output_dir: out\ndataset_name: data.jsonl\neval_dataset_name: both.jsonl\nchat_template: chat.jinja\n"
        "reward_functions: ['gold.py:score', 'package.module:score']\n",
        "there/ppo.yaml",
    )
    config = load_stage("ppo", path, {})
    assert isinstance(config, PPOConfig)
    assert config.dataset_name == "there/data.jsonl"
    assert config.eval_dataset_name == "both.jsonl"
    assert config.chat_template == "there/chat.jinja"
    assert config.reward_functions == ["there/gold.py:score", "package.module:score"]
    assert load_stage("ppo", path, {"dataset_name": "data.jsonl"}).dataset_name == "data.jsonl"  # a flag: as it is
    section = write("output_dir: out\nppo: {reward_functions: ['gold.py:score']}\n", "there/run.yaml")
    assert load_stage("ppo", section, {}).reward_functions == ["there/gold.py:score"]  # type: ignore[attr-defined]
    assert load_run(section, {}).ppo.reward_functions == ["there/gold.py:score"]


# ---- a run


RUN = """\
output_dir: out
learning_rate: 0.1
lora_r: 4
sft:
  learning_rate: 0.2
ppo:
  learning_rate: 0.3
  kl_coef: 0.7
"""


def test_a_run_shares_the_top_and_each_section_wins_over_it() -> None:
    run = load_run(write(RUN), {})
    stages: list[Any] = [run.sft, run.reward, run.ppo]
    assert [stage.learning_rate for stage in stages] == [0.2, 0.1, 0.3]
    assert [stage.lora_r for stage in stages] == [4, 4, 4]
    assert [stage.output_dir for stage in stages] == ["out/sft", "out/reward", "out/ppo"]
    assert [stage.dataset_name for stage in stages] == ["demo/sft", "demo/preferences", "demo/prompts"]
    assert run.ppo.kl_coef == 0.7
    assert (run.output_dir, run.stages) == ("out", ["sft", "reward", "ppo"])


def test_flags_of_a_run_win_over_its_sections_and_the_dotted_over_the_plain() -> None:
    run = load_run(write(RUN), {"learning_rate": "0.5", "ppo.learning_rate": "0.6", "output_dir": "other"})
    assert [run.sft.learning_rate, run.reward.learning_rate, run.ppo.learning_rate] == [0.5, 0.5, 0.6]
    assert run.ppo.output_dir == "other/ppo"
    assert run.ppo.reward_adapter == "other/reward/adapter"


def test_a_stage_default_holds_where_nothing_is_set() -> None:
    run = load_run(None, {"output_dir": "out"})
    assert (run.sft.learning_rate, run.ppo.learning_rate) == (2e-4, 1e-4)


def test_wiring_of_a_run() -> None:
    run = load_run(None, {"output_dir": "out"})
    assert run.reward.sft_adapter == run.ppo.sft_adapter == "out/sft/adapter"
    assert run.ppo.reward_adapter == "out/reward/adapter"

    run = load_run(write("output_dir: out\nstages: [sft, dpo]\n"), {})
    assert run.dpo.sft_adapter == "out/sft/adapter"

    run = load_run(write("output_dir: out\nstages: [reward, ppo]\n"), {})
    assert (run.reward.sft_adapter, run.ppo.sft_adapter) == (None, None)
    assert run.ppo.reward_adapter == "out/reward/adapter"
    Path("out/sft/adapter").mkdir(parents=True)
    assert load_run("run.yaml", {}).reward.sft_adapter == "out/sft/adapter"

    run = load_run(write("output_dir: out\nreward: {sft_adapter: null}\nppo: {sft_adapter: mine}\n"), {})
    assert (run.reward.sft_adapter, run.ppo.sft_adapter) == (None, "mine")
    assert load_run("run.yaml", {"ppo.sft_adapter": "null"}).ppo.sft_adapter is None


def test_only_the_stages_of_a_run_are_validated_and_the_error_names_the_stage() -> None:
    path = write("output_dir: out\nstages: [sft]\nppo: {lam: 2.0}\n")
    assert load_run(path, {}).ppo.lam == 2.0
    assert message("run", path, stages="sft,reward,ppo") == "stage ppo: --lam must be from 0 to 1; got 2.0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ppo: {kl_coeff: 1}", "run.yaml: unknown key 'ppo.kl_coeff' (did you mean 'ppo.kl_coef'?)"),
        ("pppo: {kl_coef: 1}", "run.yaml: unknown key 'pppo' (did you mean 'ppo'?)"),
        ("kl_coef: 1", "run.yaml: unknown key 'kl_coef' (did you mean 'ppo.kl_coef'?)"),
        ("stage: [sft]", "run.yaml: unknown key 'stage' (did you mean 'stages'?)"),
        ("ppo: {learning_rate: abc}", "run.yaml: ppo.learning_rate must be a number; got 'abc'"),
        ("ppo: [1]", "run.yaml: ppo must be a mapping of settings; got [1]"),
        (
            "ppo: {output_dir: x}",
            "run.yaml: ppo.output_dir cannot be set: a stage writes to <output_dir>/ppo; set output_dir of the run",
        ),
        ("stages: []", f"run.yaml: stages {ORDER}; got []"),
        ("stages: [ppo, sft]", f"run.yaml: stages {ORDER}; got"),
        ("stages: [sft, sft]", f"run.yaml: stages {ORDER}; got"),
        ("stages: [sfd]", f"run.yaml: stages {ORDER}; got ['sfd']"),
        ("sft:\n", "--output_dir must be set: the folder to write to"),
    ],
)
def test_a_wrong_run_yaml(text: str, expected: str) -> None:
    assert message("run", write(text)).startswith(expected)


# ---- one stage from a run YAML


def test_one_stage_from_a_run_yaml() -> None:
    for folder in ("out/sft/adapter", "out/reward/adapter"):
        Path(folder).mkdir(parents=True)
    config = load_stage("ppo", write(RUN), {"kl_coef": "0.9"})
    assert isinstance(config, PPOConfig)
    assert (config.learning_rate, config.lora_r, config.kl_coef) == (0.3, 4, 0.9)
    assert (config.output_dir, config.dataset_name) == ("out/ppo", "demo/prompts")
    assert (config.sft_adapter, config.reward_adapter) == ("out/sft/adapter", "out/reward/adapter")
    assert config == load_run("run.yaml", {"ppo.kl_coef": 0.9}).ppo

    elsewhere = load_stage("ppo", "run.yaml", {"output_dir": "again", "sft_adapter": "null"})
    assert isinstance(elsewhere, PPOConfig)
    assert (elsewhere.output_dir, elsewhere.sft_adapter) == ("again", None)
    assert elsewhere.reward_adapter == "out/reward/adapter"


def test_one_stage_asks_for_the_adapter_that_its_run_yaml_plans() -> None:
    path = write("output_dir: out\nstages: [sft, reward]\n")
    assert message("reward", path) == (
        "reward needs the folder out/sft/adapter, which is not there: "
        "run `rlhf-fast sft --config run.yaml` first, or set --sft_adapter FOLDER or null"
    )
    config = load_stage("reward", path, {"sft_adapter": "null"})
    assert isinstance(config, RewardConfig) and config.sft_adapter is None
    own = write("output_dir: out\nsft: {}\nppo: {sft_adapter: null, reward_adapter: mine}\n", "own.yaml")
    ppo = load_stage("ppo", own, {})
    assert isinstance(ppo, PPOConfig) and (ppo.sft_adapter, ppo.reward_adapter) == (None, "mine")
    unplanned = write("output_dir: out\nreward: {lora_r: 4}\n", "reward.yaml")
    assert load_stage("reward", unplanned, {}).sft_adapter is None  # type: ignore[attr-defined]


def test_one_stage_checks_the_other_sections_too() -> None:
    assert "unknown key 'ppo.lan'" in message("sft", write("output_dir: out\nppo: {lan: 1}\n"))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("lora_target_modules", [], "names of modules, or all-linear; got []"),
        ("lora_alpha", math.inf, "a finite number of float32; got inf"),
        ("lora_alpha", math.nan, "a finite number of float32; got nan"),
    ],
)
def test_adapter_settings_that_no_adapter_can_have_are_refused(field: str, value: Any, expected: str) -> None:
    config = SFTConfig(output_dir="out", dataset_name="demo/sft", **{field: value})
    with pytest.raises(UserError, match=re.escape(f"--{field} must be {expected}")):
        config.validate()


# ---- the round trip

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)
VALUES = st.fixed_dictionaries(
    {
        "run_name": TEXT | st.sampled_from([None, "null", "1e-4", "yes", "2026-01-01", "~"]),
        "learning_rate": st.floats(1e-12, 1e12),
        "adam_epsilon": st.floats(1e-300, 1e-3),
        "max_steps": st.none() | st.integers(1, 10**30),
        "trust_remote_code": st.booleans(),
        "lora_target_modules": st.lists(TEXT, min_size=1),
        "rename_columns": st.dictionaries(TEXT, TEXT),
    }
)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_a_dumped_stage_loads_equal(values: dict[str, Any]) -> None:
    config = SFTConfig(output_dir="out", dataset_name="demo/sft", **values)
    dump_yaml(config, "config.yaml")
    assert load_stage("sft", "config.yaml", {}) == config


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_every_field_of_a_dumped_stage_is_there(stage: str) -> None:
    config = load_stage(stage, None, VALID | ({"reward_functions": "a.py:f"} if stage == "ppo" else {}))
    dump_yaml(config, "config.yaml")
    assert load_stage(stage, "config.yaml", {}) == config
    written = [line.partition(":")[0] for line in Path("config.yaml").read_text().splitlines() if line[0].isalpha()]
    assert written == [item.name for item in dataclasses.fields(config)]


def test_a_dumped_run_loads_equal_also_when_an_adapter_has_appeared_since() -> None:
    path = write(RUN + "stages: [reward, ppo]\n")
    run = load_run(path, {"max_steps": "3", "reward.temperature": "0.5"})
    assert isinstance(run, RunConfig) and run.ppo.sft_adapter is None
    dump_yaml(run, "resolved.yaml")
    Path("out/sft/adapter").mkdir(parents=True)
    assert load_run("resolved.yaml", {}) == run


def test_a_dump_that_fails_leaves_the_old_file() -> None:
    config = load_stage("sft", None, {"output_dir": "out"})
    dump_yaml(config, "config.yaml")
    before = Path("config.yaml").read_bytes()
    broken = dataclasses.replace(config, run_name=object())  # type: ignore[arg-type]
    with pytest.raises(Exception, match="cannot represent"):
        dump_yaml(broken, "config.yaml")
    assert Path("config.yaml").read_bytes() == before


def test_the_names_that_a_config_takes_are_those_of_the_operations() -> None:
    """The config does not import the operations, which would make every command start slowly."""
    from rlhf_fast import config
    from rlhf_fast.ops import dpo_loss, group_advantages

    estimators = sys.modules[group_advantages.__module__].ESTIMATORS
    losses = sys.modules[dpo_loss.__module__]
    assert config.ADVANTAGE_ESTIMATORS == ("gae", *estimators)
    assert config.DPO_LOSSES == tuple(losses._LOSSES) and config.SMOOTHED_DPO_LOSSES == losses._SMOOTHED
