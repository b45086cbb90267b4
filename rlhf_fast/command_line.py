"""The commands of `rlhf-fast` and their flags. The stages' flags are their config's fields."""

import argparse
import dataclasses
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from rlhf_fast.config import STAGES, RunConfig, StageConfig
from rlhf_fast.config_values import field_kinds, split_optional
from rlhf_fast.errors import UserError, nearest
from rlhf_fast.verdicts import Thresholds

OVERVIEW = """\
rlhf-fast: SFT, reward model, DPO and PPO on one frozen base.

  rlhf-fast run    --config run.yaml --output_dir out         the stages in a row
  rlhf-fast sft    --dataset_name chats.jsonl --output_dir out/sft
  rlhf-fast reward --dataset_name pairs.jsonl --sft_adapter out/sft/adapter --output_dir out/reward
  rlhf-fast ppo    --dataset_name prompts.jsonl --sft_adapter out/sft/adapter \\
                   --reward_adapter out/reward/adapter --output_dir out/ppo
  rlhf-fast dpo    --dataset_name pairs.jsonl --sft_adapter out/sft/adapter --output_dir out/dpo

  rlhf-fast plan run --config run.yaml                    memory and time, before any weights are loaded
  rlhf-fast doctor run.yaml                               model, tokenizer, data and settings checked before a run
  rlhf-fast monitor out                                   what went wrong in a run, from its logs
  rlhf-fast report out --follow                           the page of a run, also while it runs; report A B compares
  rlhf-fast samples out --worst kl                        prompts and responses: score, KL, what SFT would have said

  rlhf-fast merge  --adapter out/ppo/policy --output_dir out/model      an adapter into a plain model
  rlhf-fast bench  --only gae --threads 2                 the operations timed beside torch and other libraries

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
    "doctor": "Check model, tokenizer, data and settings before a run: doctor FILE.yaml, or doctor STAGE and its flags."
    " --json prints JSON; --strict counts warnings as errors. Exit code 4 if a check is not passed.",
    "monitor": "What went wrong in a run, from its logs, or those of another trainer. Exit code 3 where something did.",
    "report": "Write the HTML page of a run, or of several runs beside each other.",
    "samples": "Browse the samples of a run, ours or another trainer's, in the terminal.",
    "merge": "Merge an adapter into its base: a plain model folder.",
    "bench": "Time the operations beside torch and the other libraries that are installed.",
}
METAVARS: dict[Any, str] = {
    int: "N",
    float: "NUMBER",
    str: "TEXT",
    bool: "true|false",
    list[str]: "A,B",
    list[float]: "N,N",
    dict[str, str]: "A=B,..",
    dict[str, float]: "NAME=N,..",
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


def monitor_parser(command: str) -> Parser:
    parser = Parser(command)
    parser.usage = "rlhf-fast monitor RUN_OR_LOG [--json] [--THRESHOLD NUMBER ...]"
    parser.add_argument("RUN_OR_LOG", help="A run's folder, a stage's folder, or a log, also of another trainer.")
    parser.flag(parser, "json", "Print the verdicts as JSON.", action="store_true")
    thresholds = parser.add_argument_group("thresholds")
    for item in dataclasses.fields(Thresholds):
        parser.flag(thresholds, item.name, f"{item.metadata['help']} [{item.default:g}]", metavar="NUMBER")
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


def samples_parser(command: str) -> Parser:
    parser = Parser(command)
    parser.usage = f"rlhf-fast {command} RUN [--FLAG VALUE ...]"
    parser.add_argument("run", metavar="RUN", help="Folder of a run or stage, or another log with samples.")
    parser.flag(
        parser, "worst", "The lowest score, highest KL or longest response first.", choices=["kl", "score", "length"]
    )
    parser.flag(parser, "best", "The highest score first. [newest step first]", choices=["score"])
    parser.flag(
        parser,
        "diff",
        "Mark the difference from the response to the same prompt at a step; sft: step 0.",
        metavar="sft|STEP",
    )
    parser.flag(parser, "step", "Samples of this step alone.", metavar="N", type=int)
    parser.flag(parser, "prompt", "Samples whose prompt has this text in it.", metavar="TEXT")
    parser.flag(parser, "plain", "Print text, as where standard output is no terminal.", action="store_true")
    parser.flag(parser, "limit", "Samples to print as text at most. [20]", metavar="N", type=int)
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


PARSERS: dict[str, Callable[[str], Parser]] = {
    **dict.fromkeys(STAGES, stage_parser),
    "run": run_parser,
    "monitor": monitor_parser,
    "report": report_parser,
    "samples": samples_parser,
    "merge": merge_parser,
    "bench": bench_parser,
}
