"""YAML file + flags -> checked configs, and back to YAML. Defaults, then the YAML, then the flags; the later wins.

Two kinds of YAML. A stage YAML holds one stage's fields, flat. A run YAML holds at the top the fields that all stages
share, `output_dir` and `stages`, and a section `sft:`, `reward:`, `dpo:` or `ppo:` for what is that stage's alone; any
of these sections, or `stages`, makes a file a run YAML. A run YAML serves `rlhf-fast run` and, to do one stage again,
`rlhf-fast STAGE`.
"""

import dataclasses
import os
from collections.abc import Callable, Set
from pathlib import Path

import yaml

from rlhf_fast.config import DEFAULT_MODEL, DEFAULT_STAGES, STAGES, RunConfig, StageConfig
from rlhf_fast.config_values import Settings, field_kinds, read_settings, show
from rlhf_fast.config_yaml import read_yaml
from rlhf_fast.errors import UserError
from rlhf_fast.files import write_atomic
from rlhf_fast.text import shown

STAGE_OUTPUT_ADAPTER = "adapter"
DEMO_DATA: dict[str, Settings] = {
    "sft": {"dataset_name": "demo/sft"},
    "reward": {"dataset_name": "demo/preferences"},
    "dpo": {"dataset_name": "demo/preferences"},
    "ppo": {"dataset_name": "demo/prompts", "eval_dataset_name": "demo/prompts-eval"},
}
# Which stage makes the adapter that a field names.
ADAPTER_MAKERS = {"sft_adapter": "sft", "reward_adapter": "reward"}
# Field -> "here" or "beside", for the fields that name files and folders; see ``config.option``.
PATHS = {
    item.name: item.metadata["path"]
    for config_class in STAGES.values()
    for item in dataclasses.fields(config_class)
    if item.metadata["path"]
}


@dataclasses.dataclass
class RunSettings:
    """What a run YAML or the flags of `rlhf-fast run` set, types checked; nothing that they leave out."""

    shared: Settings
    sections: dict[str, Settings]
    stages: list[str] | None


def load_stage(stage: str, yaml_path: str | None, flags: Settings) -> StageConfig:
    """The checked config of one stage ("sft", "reward", "dpo" or "ppo"), from a stage YAML or a run YAML, and flags.

    ``flags`` maps field names to text, or to values of the field's own type; "null" unsets an optional field. With a
    run YAML the stage writes to `<output_dir>/<stage>` and takes the adapters of the stages before it, as in
    ``load_run``; `--output_dir` names the stage's own folder and leaves those adapters where the YAML has them.

    Data and function paths in a YAML start from the current directory; one that is not there and is found from the
    YAML's own folder is taken from there, so that an example runs from anywhere.

    Raises UserError, naming the file and key or the flag, what was expected and what came.
    """
    kinds = field_kinds(STAGES[stage])
    given = find_homes(read_settings(flags, kinds, "--"), "--")
    yaml_path = find_home(yaml_path, "--config ") if yaml_path else None
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
        settings = find_homes(read_settings(document, kinds, f"{yaml_path}: "), f"{yaml_path}: ")
        settings = find_paths(settings, yaml_path) if yaml_path else settings
    config = build(stage, settings | given)
    config.config_file = yaml_path or ""
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
    yaml_path = find_home(yaml_path, "--config ") if yaml_path else None
    run = read_run_yaml(read_yaml(yaml_path), yaml_path) if yaml_path else read_run({}, "--")
    given = read_run(nest(flags), "--")
    stages = given.stages or run.stages or list(DEFAULT_STAGES)
    folder = (run.shared | given.shared).get("output_dir")
    if not folder:
        raise UserError("--output_dir must be set: the folder to write to")

    configs = {}
    for stage in STAGES:
        settings = run.shared | run.sections[stage] | given.shared | given.sections[stage]
        settings = wiring(stage, folder, stages) | settings | {"output_dir": os.path.join(folder, stage)}
        configs[stage] = build(stage, settings)
        configs[stage].config_file = yaml_path or ""
    for stage in stages:
        try:
            configs[stage].validate()
        except UserError as error:
            raise UserError(f"stage {stage}: {error}") from None
    whole = RunConfig(**configs, output_dir=folder, stages=stages)  # type: ignore[arg-type]
    whole.config_file = yaml_path or ""
    return whole


def command_of(yaml_path: str) -> str:
    """ "run" for a run YAML; else the one stage that has all of the file's settings.

    Raises UserError if no stage has them, or several have.
    """
    document = read_yaml(yaml_path)
    if "stages" in document or any(name in document for name in STAGES):
        return "run"
    fitting = [stage for stage, kind in STAGES.items() if document.keys() <= field_kinds(kind).keys()]
    if len(fitting) == 1:
        return fitting[0]
    which = f"its settings are of {' or '.join(fitting)}" if fitting else "no stage has all of its settings"
    raise UserError(f"{yaml_path}: {which}; name the stage: STAGE --config {yaml_path}")


def dump_yaml(config: StageConfig | RunConfig, path: str | os.PathLike[str]) -> None:
    """Writes every field to ``path``, whole or not at all; loading the file again gives an equal config."""
    document = dataclasses.asdict(config)
    if isinstance(config, RunConfig):
        sections = {stage: document.pop(stage) for stage in STAGES}
        for section in sections.values():
            del section["output_dir"]  # follows from the run's
        document |= sections
    write_atomic(Path(path), yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


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
        settings = read_settings(section or {}, field_kinds(config_class), prefix, f"{stage}.")
        sections[stage] = find_homes(settings, f"{prefix}{stage}.")
    top = {key: value for key, value in document.items() if key not in STAGES}
    section_keys = [f"{stage}.{name}" for stage, kind in STAGES.items() for name in field_kinds(kind)]
    top_kinds = field_kinds(StageConfig) | {"stages": list[str]}
    shared = find_homes(read_settings(top, top_kinds, prefix, others=[*STAGES, *section_keys]), prefix)
    stages = shared.pop("stages", None)
    if stages is not None and (not stages or stages != [stage for stage in STAGES if stage in stages]):
        expected = f"some of {', '.join(STAGES)}, each once and in this order"
        raise UserError(f"{prefix}stages must be {expected}; got {show(stages)}")
    return RunSettings(shared, sections, stages)


def find_homes(settings: Settings, prefix: str) -> Settings:
    """``settings`` with `~` and `~user` at the start of a path as that home folder; ``prefix`` is for messages."""
    return change_paths(settings, PATHS.keys(), lambda value, name: find_home(value, f"{prefix}{name} "))


def find_home(value: str, where: str) -> str:
    found = os.path.expanduser(value) if "{" not in value else value  # a chat template may be Jinja text
    if found.startswith("~") and "{" not in value and not os.path.exists(found):
        folder = found.split("/")[0]
        raise UserError(f"{where}{shown(value)}: no home folder is known for {shown(folder)}; write the whole path")
    return found


def find_paths(settings: Settings, yaml_path: str) -> Settings:
    """``settings`` with each path that is only found from the YAML's own folder leading there."""
    beside = {name for name, kind in PATHS.items() if kind == "beside"}
    return change_paths(settings, beside, lambda value, _: find_path(value, yaml_path))


def change_paths(settings: Settings, names: Set[str], change: Callable[[str, str], str]) -> Settings:
    """``settings`` with ``change(path, name)`` in place of each path of the fields ``names``."""
    changed = dict(settings)
    for name in settings.keys() & names:
        value = settings[name]
        if isinstance(value, list):
            changed[name] = [change(item, name) for item in value]
        elif value:
            changed[name] = change(value, name)
    return changed


def find_path(value: str, yaml_path: str) -> str:
    path, colon, function = value.rpartition(":") if ".py:" in value else (value, "", "")
    beside = os.path.join(os.path.dirname(yaml_path), path)
    return value if os.path.exists(path) or not os.path.exists(beside) else beside + colon + function
