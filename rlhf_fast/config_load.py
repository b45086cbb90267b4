"""YAML file + flags -> checked configs, and back to YAML. Defaults, then the YAML, then the flags; the later wins.

Two kinds of YAML. A stage YAML holds one stage's fields, flat. A run YAML holds at the top the fields that all stages
share, `output_dir` and `stages`, and a section `sft:`, `reward:` or `ppo:` for what is that stage's alone; any of
these sections, or `stages`, makes a file a run YAML. A run YAML serves `rlhf-fast run` and, to do one stage again,
`rlhf-fast STAGE`.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.config import DEFAULT_MODEL, STAGES, RunConfig, StageConfig
from rlhf_fast.config_values import Settings, field_kinds, read_settings, show
from rlhf_fast.errors import UserError, nearest

STAGE_OUTPUT_ADAPTER = "adapter"
DEMO_DATA: dict[str, Settings] = {
    "sft": {"dataset_name": "demo/sft"},
    "reward": {"dataset_name": "demo/preferences"},
    "ppo": {"dataset_name": "demo/prompts", "eval_dataset_name": "demo/prompts-eval"},
}
# Which stage makes the adapter that a field names.
ADAPTER_MAKERS = {"sft_adapter": "sft", "reward_adapter": "reward"}
PATH_FIELDS = ("dataset_name", "eval_dataset_name", "chat_template", "reward_functions", "eval_functions")


@dataclasses.dataclass
class RunSettings:
    """What a run YAML or the flags of `rlhf-fast run` set, types checked; nothing that they leave out."""

    shared: Settings
    sections: dict[str, Settings]
    stages: list[str] | None


def load_stage(stage: str, yaml_path: str | None, flags: Settings) -> StageConfig:
    """The checked config of one stage ("sft", "reward" or "ppo"), from a stage YAML or a run YAML, and flags.

    ``flags`` maps field names to text, or to values of the field's own type; "null" unsets an optional field. With a
    run YAML the stage writes to `<output_dir>/<stage>` and takes the adapters of the stages before it, as in
    ``load_run``; `--output_dir` names the stage's own folder and leaves those adapters where the YAML has them.

    Data and function paths in a YAML start from the current directory; one that is not there and is found from the
    YAML's own folder is taken from there, so that an example runs from anywhere.

    Raises UserError, naming the file and key or the flag, what was expected and what came.
    """
    kinds = field_kinds(STAGES[stage])
    given = read_settings(flags, kinds, "--")
    document = read_yaml(yaml_path) if yaml_path else {}
    if yaml_path and ("stages" in document or any(name in document for name in STAGES)):
        run = read_run_yaml(document, yaml_path)
        settings = run.shared | run.sections[stage]
        folder = settings.pop("output_dir", None)
        if folder is not None:
            planned = run.stages if run.stages is not None else [name for name in STAGES if name in document]
            wired = wiring(stage, folder, planned)
            settings = {"output_dir": os.path.join(folder, stage)} | wired | settings
            for name in wired.keys() - given.keys() - run.sections[stage].keys():
                require_adapter(stage, name, wired[name], yaml_path)
    else:
        settings = read_settings(document, kinds, f"{yaml_path}: ")
        settings = find_paths(settings, yaml_path) if yaml_path else settings
    config = build(stage, settings | given)
    config.validate()
    return config


def load_run(yaml_path: str | None, flags: Settings) -> RunConfig:
    """The checked configs of all stages, from a run YAML and flags.

    ``flags`` as in ``load_stage``; a plain name (`learning_rate`) holds for every stage and wins over the YAML's
    sections, `STAGE.name` (`ppo.learning_rate`) holds for one and wins over the plain one. A stage writes to
    `<output_dir>/<stage>`. Its `sft_adapter` and `reward_adapter`, where neither YAML nor flags set them (null sets
    them, to none), are those in `<output_dir>/sft/adapter` and `<output_dir>/reward/adapter`, if the stage that makes
    them is in `stages` or the folder exists. Paths and errors as in ``load_stage``.
    """
    run = read_run_yaml(read_yaml(yaml_path), yaml_path) if yaml_path else read_run({}, "--")
    given = read_run(nest(flags), "--")
    stages = given.stages or run.stages or list(STAGES)
    folder = (run.shared | given.shared).get("output_dir")
    if not folder:
        raise UserError("--output_dir must be set: the folder to write to")

    configs = {}
    for stage in STAGES:
        settings = run.shared | run.sections[stage] | given.shared | given.sections[stage]
        settings = wiring(stage, folder, stages) | settings | {"output_dir": os.path.join(folder, stage)}
        configs[stage] = build(stage, settings)
    for stage in stages:
        try:
            configs[stage].validate()
        except UserError as error:
            raise UserError(f"stage {stage}: {error}") from None
    return RunConfig(**configs, output_dir=folder, stages=stages)  # type: ignore[arg-type]


def dump_yaml(config: StageConfig | RunConfig, path: str | os.PathLike[str]) -> None:
    """Writes every field to ``path``, whole or not at all; loading the file again gives an equal config."""
    document = dataclasses.asdict(config)
    if isinstance(config, RunConfig):
        sections = {stage: document.pop(stage) for stage in STAGES}
        for section in sections.values():
            del section["output_dir"]  # follows from the run's
        document |= sections
    part = f"{os.fspath(path)}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            yaml.safe_dump(document, file, sort_keys=False, allow_unicode=True)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"could not write {os.fspath(path)}: {error.strerror or error}; name another folder") from error


def build(stage: str, settings: Settings) -> StageConfig:
    if "dataset_name" not in settings and settings.get("model_name_or_path", DEFAULT_MODEL) == DEFAULT_MODEL:
        settings = DEMO_DATA[stage] | settings
    return STAGES[stage](**settings)


def wiring(stage: str, folder: str, stages: list[str]) -> Settings:
    """The adapters of earlier stages that ``stage`` starts from: those that exist or that ``stages`` will make."""
    wired = {}
    for name, maker in ADAPTER_MAKERS.items():
        adapter = os.path.join(folder, maker, STAGE_OUTPUT_ADAPTER)
        if name in field_kinds(STAGES[stage]) and (maker in stages or os.path.isdir(adapter)):
            wired[name] = adapter
    return wired


def require_adapter(stage: str, name: str, adapter: str, yaml_path: str) -> None:
    # Going on without it would train from the bare base, or on other rewards, where the file says otherwise.
    if not os.path.isdir(adapter):
        maker = ADAPTER_MAKERS[name]
        fix = f"run `rlhf-fast {maker} --config {yaml_path}` first, or set --{name} FOLDER or null"
        raise UserError(f"{stage} needs the folder {adapter}, which is not there: {fix}")


def nest(flags: Settings) -> Settings:
    """{"ppo.lam": 1} -> {"ppo": {"lam": 1}}, the shape of a run YAML."""
    nested: Settings = {}
    for name, value in flags.items():
        section, dot, key = name.partition(".")
        if dot and section in STAGES:
            nested.setdefault(section, {})[key] = value
        else:
            nested[name] = value
    return nested


def read_run_yaml(document: Settings, yaml_path: str) -> RunSettings:
    run = read_run(document, f"{yaml_path}: ")
    sections = {stage: find_paths(section, yaml_path) for stage, section in run.sections.items()}
    return RunSettings(find_paths(run.shared, yaml_path), sections, run.stages)


def read_run(document: Settings, prefix: str) -> RunSettings:
    sections = {}
    for stage, config_class in STAGES.items():
        section = document.get(stage)
        if section is not None and not isinstance(section, dict):
            raise UserError(f"{prefix}{stage} must be a mapping of settings; got {show(section)}")
        if section and "output_dir" in section:
            where = f"a stage writes to <output_dir>/{stage}; set output_dir of the run"
            raise UserError(f"{prefix}{stage}.output_dir cannot be set: {where}")
        sections[stage] = read_settings(section or {}, field_kinds(config_class), prefix, f"{stage}.")
    top = {key: value for key, value in document.items() if key not in STAGES}
    section_keys = [f"{stage}.{name}" for stage, kind in STAGES.items() for name in field_kinds(kind)]
    top_kinds = field_kinds(StageConfig) | {"stages": list[str]}
    shared = read_settings(top, top_kinds, prefix, others=[*STAGES, *section_keys])
    stages = shared.pop("stages", None)
    if stages is not None and (not stages or stages != [stage for stage in STAGES if stage in stages]):
        expected = f"some of {', '.join(STAGES)}, each once and in this order"
        raise UserError(f"{prefix}stages must be {expected}; got {show(stages)}")
    return RunSettings(shared, sections, stages)


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and drops the first without a word; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> Settings:
    """The mapping in a YAML file; {} for an empty file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        document = yaml.load(text, UniqueKeyLoader)
    except FileNotFoundError:
        folder = Path(path).parent
        neighbours = [item.name for item in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"{path}: no such config file{nearest(Path(path).name, neighbours)}") from None
    except OSError as error:
        raise UserError(f"{path}: the config file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{path}{where}: not valid YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        character = f"the character {chr(error.character)!r} is not allowed"
        raise UserError(f"{path}, line {line}, column {column}: not valid YAML: {character}") from None
    except ValueError as error:  # PyYAML lets these out for a date such as 2026-13-01
        raise UserError(f"{path}: not valid YAML: {error}; put text that looks like a date in quotes") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError(f"{path}: must hold settings as `name: value` lines; got {show(document)}")
    return document


def find_paths(settings: Settings, yaml_path: str) -> Settings:
    """``settings`` with each path that is only found from the YAML's own folder leading there."""
    found = dict(settings)
    for name in settings.keys() & PATH_FIELDS:
        value = settings[name]
        found[name] = (
            [find_path(item, yaml_path) for item in value] if isinstance(value, list) else find_path(value, yaml_path)
        )
    return found


def find_path(value: str | None, yaml_path: str) -> str | None:
    if not value:
        return value
    path, colon, function = value.rpartition(":") if ".py:" in value else (value, "", "")
    beside = os.path.join(os.path.dirname(yaml_path), path)
    return value if os.path.exists(path) or not os.path.exists(beside) else beside + colon + function
