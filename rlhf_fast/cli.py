"""The command line: `rlhf-fast sft | reward | dpo | ppo | run | plan | merge | bench | report`. The stages' flags are
their config's fields.

Nothing heavy (torch, transformers) is imported before the flags and the YAML are read, so that help and mistakes answer
at once. Exit codes: 0 done, 1 an unexpected exception, 2 a mistake that the message names, 130 interrupted (Ctrl-C,
SIGTERM, SIGHUP).
"""

import argparse
import dataclasses
import importlib.metadata
import os
import sys
import typing
from typing import Any, NoReturn

from rlhf_fast.config import STAGES, RunConfig, StageConfig
from rlhf_fast.config_load import find_home, load_run, load_stage
from rlhf_fast.config_values import field_kinds, split_optional
from rlhf_fast.errors import Interrupted, UserError, is_out_of_memory, nearest
from rlhf_fast.signals import Interruptible
from rlhf_fast.text import one_line, safe_streams, shown, tell, traceback_text

OVERVIEW = """\
rlhf-fast: SFT, reward model, DPO and PPO on one frozen base.

  rlhf-fast run    --config run.yaml --output_dir out         the stages in a row
  rlhf-fast sft    --dataset_name chats.jsonl --output_dir out/sft
  rlhf-fast reward --dataset_name pairs.jsonl --sft_adapter out/sft/adapter --output_dir out/reward
  rlhf-fast ppo    --dataset_name prompts.jsonl --sft_adapter out/sft/adapter \\
                   --reward_adapter out/reward/adapter --output_dir out/ppo
  rlhf-fast dpo    --dataset_name pairs.jsonl --sft_adapter out/sft/adapter --output_dir out/dpo
  rlhf-fast plan run --config run.yaml                    memory and time, before any weights are loaded
  rlhf-fast merge  --adapter out/ppo/policy --output_dir out/model      an adapter into a plain model
  rlhf-fast bench  --only gae --threads 2                 the operations timed beside torch and other libraries
  rlhf-fast report out --follow      the HTML page of a run, also while it runs; report A B compares runs

Without --dataset_name the built-in model learns from built-in demo data.
rlhf-fast COMMAND --help lists a command's flags; --config FILE.yaml sets them by name, and flags win over it.
rlhf-fast --version prints the version."""

COMMANDS = {
    "sft": "Supervised fine-tuning on response tokens alone.",
    "reward": "A Bradley-Terry reward model on preference pairs.",
    "dpo": "DPO on preference pairs, against the SFT model.",
    "ppo": "PPO with a KL leash to the SFT model.",
    "run": "The stages in a row. A plain flag holds for every stage, --STAGE.NAME for one.",
    "plan": "Memory and time on this CPU, before weights are loaded: plan STAGE or plan run, then its flags.",
    "merge": "Merge an adapter into its base: a plain model folder.",
    "bench": "Time the operations beside torch and the other libraries that are installed.",
    "report": "Write the HTML page of a run, or of several runs beside each other.",
}
METAVARS: dict[Any, str] = {
    int: "N",
    float: "NUMBER",
    str: "TEXT",
    bool: "true|false",
    list[str]: "A,B",
    list[float]: "N,N",
    dict[str, str]: "OLD=NEW,..",
}


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line, not with the list of all flags, and guesses no abbreviations."""

    def __init__(self, command: str) -> None:
        super().__init__(
            prog=f"rlhf-fast {command}",
            usage=f"rlhf-fast {command} [--FLAG VALUE ...]",
            description=COMMANDS[command],
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
        )
        self.flags: list[str] = ["--help"]
        self.flag(
            self, "debug", "Print the traceback of every error, not of unexpected ones alone.", action="store_true"
        )

    def flag(self, group: Any, name: str, help: str, **settings: Any) -> None:
        self.flags.append(f"--{name}")
        group.add_argument(f"--{name}", help=help.replace("%", "%%"), **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def read(self, argv: list[str]) -> dict[str, Any]:
        """Flag name -> text, for the flags that are there."""
        known, unknown = self.parse_known_args(argv)
        if unknown and not unknown[0].startswith("-"):
            raise UserError(f"unexpected {unknown[0]!r}: settings are given as --FLAG VALUE, a file as --config FILE")
        if unknown:
            flag = unknown[0].partition("=")[0]
            raise UserError(f"unknown flag {flag}{nearest(flag, self.flags)}; {self.prog} --help lists the flags")
        return vars(known)


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (default: that of the process) and returns its exit code."""
    own_process = argv is None
    if own_process:
        safe_streams()
        # oneDNN keeps the code of its last 1,024 kernels, each 1 to 2 MB with AMX, and steps of ever other lengths fill
        # that; the micro-batches of one PPO step need about 200
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    with Interruptible(whole_process=own_process):
        try:
            run_command(argv)
            return 0
        except BaseException as error:  # also what other people's code raises to end its process, such as sys.exit(0)
            message, code = explain(error)
            if debug or code == 1:
                tell(traceback_text(error))
            tell(one_line(message))
            return code


def explain(error: BaseException) -> tuple[str, int]:
    """The line for a person, and the exit code."""
    if isinstance(error, UserError):
        return f"rlhf-fast: error: {error}", 2
    if isinstance(error, Interrupted):
        return str(error), 130
    if isinstance(error, KeyboardInterrupt):
        return "rlhf-fast: interrupted", 130
    if isinstance(error, SystemExit):
        code = shown(error.code)
        return f"rlhf-fast: error: code that the command ran called sys.exit({code}): it has not finished", 2
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if is_out_of_memory(error):
        advice = "lower --micro_batch_size or --max_length, or take a smaller model"
        return f"rlhf-fast: error: out of memory: {advice} ({text}; --debug shows where)", 2
    return f"rlhf-fast: internal error: {text} (the traceback is above)", 1


def run_command(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command in ("--help", "-h"):
        tell(OVERVIEW, sys.stdout)
        return
    if command == "--version":
        tell(f"rlhf-fast {installed_version()}", sys.stdout)
        return
    if command not in COMMANDS:
        commands = ", ".join(COMMANDS)
        raise UserError(f"unknown command {command!r}{nearest(command, list(COMMANDS))}; the commands are {commands}")

    planned = command == "plan"
    if planned:
        argv = argv[1:]
        command = argv[0] if argv else ""
        if command in ("--help", "-h"):
            tell(COMMANDS["plan"], sys.stdout)
            return
        if command not in ("run", *STAGES):
            names = ", ".join(STAGES)
            raise UserError(f"plan takes the command line of {names} or run: plan ppo --FLAG; got {command!r}")

    makers = {"run": run_parser, "merge": merge_parser, "bench": bench_parser, "report": report_parser}
    parser = makers.get(command, stage_parser)(command)
    if "--help" in argv or "-h" in argv:
        tell(parser.format_help().rstrip(), sys.stdout)
        return
    flags = parser.read(argv[1:])
    flags.pop("debug", None)
    if command == "merge":
        from rlhf_fast.models.merge import merge

        folders = {name: find_home(flags[name], f"--{name} ") for name in ("adapter", "output_dir")}
        merge(folders["adapter"], folders["output_dir"], flags.get("dtype"))
        tell(f"merged model: {folders['output_dir']}", sys.stdout)
    elif command == "bench":
        from rlhf_fast.bench.command import bench

        bench(flags)
    elif command == "report":
        from rlhf_fast.monitor.follow import report

        runs = [find_home(run, "RUN ") for run in flags["runs"]]
        output = find_home(flags["output"], "--output ") if "output" in flags else None
        report(runs, output, following="follow" in flags)
    elif command == "run":
        run_config = load_run(flags.pop("config", None), flags)
        if planned:
            from rlhf_fast.recipes.plan import plan

            for stage in run_config.stages:
                plan(getattr(run_config, stage))
            return
        from rlhf_fast.recipes.run import run

        run(run_config)
    else:
        config: Any = load_stage(command, flags.pop("config", None), flags)
        if planned:
            from rlhf_fast.recipes.plan import plan

            plan(config)
            return
        from rlhf_fast.recipes import dpo, ppo, reward, sft
        from rlhf_fast.recipes.failure import failure_kept

        with failure_kept(config.output_dir):
            {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}[command].train(config)


def installed_version() -> str:
    try:
        return importlib.metadata.version("rlhf-fast")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("no version: this checkout is not installed; `pip install -e .` installs it") from None


def stage_parser(stage: str) -> Parser:
    return add_stage(Parser(stage), stage)


def add_stage(parser: Parser, stage: str) -> Parser:
    parser.flag(parser, "config", "YAML of this stage, or of a whole run. Flags win over it.", metavar="FILE")
    own = parser.add_argument_group(f"{stage} alone")
    shared = parser.add_argument_group("shared by all stages")
    for item in dataclasses.fields(STAGES[stage]):
        add_field(parser, own if is_own(item.name) else shared, STAGES[stage], item)
    return parser


def run_parser(command: str) -> Parser:
    parser = Parser(command)
    parser.flag(parser, "config", "YAML of the run: shared settings, and a section for each stage.", metavar="FILE")
    stages = next(item for item in dataclasses.fields(RunConfig) if item.name == "stages")
    add_field(parser, parser, RunConfig, stages)
    shared = parser.add_argument_group("for every stage", "Where a stage has another default, its own group tells.")
    for item in dataclasses.fields(StageConfig):
        add_field(parser, shared, StageConfig, item)
    for stage, config_class in STAGES.items():
        group = parser.add_argument_group(f"for {stage} alone")
        for item in dataclasses.fields(config_class):
            if item.name != "output_dir":  # always that of the run, and the stage's name
                add_field(parser, group, config_class, item, stage)
    return parser


def merge_parser(command: str) -> Parser:
    parser = Parser(command)
    parser.flag(parser, "adapter", "The adapter folder.", required=True, metavar="FOLDER")
    parser.flag(parser, "output_dir", "Folder for the merged model.", required=True, metavar="FOLDER")
    parser.flag(parser, "dtype", "dtype of the merged weights. Unset: the base's.", metavar="DTYPE")
    return parser


def bench_parser(command: str) -> Parser:
    parser = Parser(command)
    parser.flag(parser, "only", "Benches to run, by op, or `overhead`. [all]", metavar="A,B")
    parser.flag(parser, "quick", "Small sizes: seconds, not minutes.", action="store_true")
    parser.flag(parser, "device", "cpu, cuda or cuda:N. [cpu]", metavar="DEVICE")
    parser.flag(parser, "threads", "CPU threads. [torch's own choice]", metavar="N", type=int)
    parser.flag(parser, "json", "Write every figure here; in a folder: named after the device.", metavar="FILE")
    parser.flag(parser, "markdown", "Write tables here.", metavar="FILE")
    parser.flag(parser, "chart", "Write a bar chart here; needs matplotlib.", metavar="FILE.png")
    parser.flag(parser, "list", "Only list the workloads and their marks.", action="store_true")
    return parser


def report_parser(command: str) -> Parser:
    parser = Parser(command)
    parser.usage = f"rlhf-fast {command} RUN [RUN ...] [--FLAG VALUE ...]"
    runs = "The output folder of a run or of a stage; several are shown beside each other."
    parser.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    default = "report.html in the run's folder; of several runs, comparison.html"
    parser.flag(parser, "output", f"The page to write. [{default}]", metavar="FILE")
    follow = "Write it again whenever the run's files change, until the run ends; Ctrl-C ends it."
    parser.flag(parser, "follow", follow, action="store_true")
    return parser


def add_field(parser: Parser, group: Any, config_class: type, item: dataclasses.Field[Any], stage: str = "") -> None:
    """One field as a flag that takes text; reading the text is the work of config_load, in one place for YAML too."""
    kind, _ = split_optional(field_kinds(config_class)[item.name])
    help = f"--{item.name}, here alone." if stage and not is_own(item.name) else item.metadata["help"]
    choices = item.metadata["choices"]
    parser.flag(
        group,
        f"{stage}.{item.name}" if stage else item.name,
        f"{help} [{show_default(item)}]",
        metavar="|".join(choices) if choices else METAVARS[kind],
        **({"nargs": "?", "const": "true"} if kind is bool else {}),
    )


def is_own(name: str) -> bool:
    return name not in field_kinds(StageConfig)


def show_default(item: dataclasses.Field[Any]) -> str:
    default = item.default if item.default is not dataclasses.MISSING else typing.cast(Any, item.default_factory)()
    if default is None or default in ("", [], {}):
        return "unset"
    return ",".join(default) if isinstance(default, list) else str(default).lower()


if __name__ == "__main__":
    sys.exit(main())
