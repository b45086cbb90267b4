"""`rlhf-fast COMMAND`: reads a command line and runs it; the commands and flags are in ``command_line.py``.

Nothing heavy (torch, transformers) is imported before the flags and the YAML are read, so that help and mistakes answer
at once. Exit codes: 0 done, 1 an unexpected exception, 2 a mistake that the message names, 3 the monitor has found
something, 4 a check of the doctor is not passed, 130 interrupted (Ctrl-C, SIGTERM, SIGHUP).
"""

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from rlhf_fast.command_line import COMMANDS, OVERVIEW, PARSERS
from rlhf_fast.config import STAGES, RunConfig, StageConfig
from rlhf_fast.config_load import command_of, find_home, load_run, load_stage
from rlhf_fast.config_values import field_kinds, read_settings
from rlhf_fast.errors import Interrupted, UserError, is_out_of_memory, nearest
from rlhf_fast.signals import Interruptible
from rlhf_fast.text import one_line, safe_streams, shown, tell, traceback_text
from rlhf_fast.verdicts import Thresholds

Flags = dict[str, Any]


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
            return run_command(argv)
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


def run_command(argv: list[str]) -> int:
    """Runs the command of ``argv``; returns its exit code."""
    command, *arguments = argv or ["--help"]
    if command in ("--help", "-h"):
        tell(OVERVIEW, sys.stdout)
        return 0
    if command == "--version":
        tell(f"rlhf-fast {installed_version()}", sys.stdout)
        return 0
    if command not in COMMANDS:
        commands = ", ".join(COMMANDS)
        raise UserError(f"unknown command {command!r}{nearest(command, list(COMMANDS))}; the commands are {commands}")
    if command in ("plan", "doctor"):
        return before_a_run(command, arguments)
    flags = read_flags(command, arguments)
    if flags is None:
        return 0
    if command in ("run", *STAGES):
        return train(command, flags)
    return {"monitor": monitor, "report": report, "samples": samples, "merge": merge, "bench": bench}[command](flags)


def read_flags(command: str, arguments: list[str]) -> Flags | None:
    """The flags of a command; None where its help was asked for, and printed."""
    parser = PARSERS[command](command)
    if "--help" in arguments or "-h" in arguments:
        tell(parser.format_help().rstrip(), sys.stdout)
        return None
    flags = parser.read(arguments)
    flags.pop("debug", None)
    return flags


def load(command: str, flags: Flags) -> RunConfig | StageConfig:
    file = flags.pop("config", None)
    return load_run(file, flags) if command == "run" else load_stage(command, file, flags)


def train(command: str, flags: Flags) -> int:
    """A stage, or with ``run`` the stages in a row."""
    config: Any = load(command, flags)
    if command == "run":
        from rlhf_fast.recipes.run import run

        run(config)
        return 0
    from rlhf_fast.recipes import dpo, ppo, reward, sft
    from rlhf_fast.recipes.failure import failure_kept

    with failure_kept(config.output_dir):
        {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}[command].train(config)
    return 0


def before_a_run(command: str, arguments: list[str]) -> int:
    """``plan`` or ``doctor``, with the command line of a run or of a stage."""
    options = {"--json", "--strict"} & set(arguments) if command == "doctor" else set()
    arguments = [argument for argument in arguments if argument not in options]
    first = arguments[0] if arguments else ""
    if first in ("--help", "-h"):
        tell(COMMANDS[command], sys.stdout)
        return 0
    if command == "doctor" and first.endswith((".yaml", ".yml")):
        arguments = [command_of(find_home(first, "")), "--config", *arguments]
    stage, *rest = arguments or [""]
    if stage not in ("run", *STAGES):
        names = ", ".join(STAGES)
        raise UserError(f"{command} takes the command line of {names} or run: {command} ppo --FLAG; got {stage!r}")
    flags = read_flags(stage, rest)
    if flags is None:
        return 0
    config = load(stage, flags)
    if command == "doctor":
        from rlhf_fast.doctor import doctor

        return doctor(config, as_json="--json" in options, strict="--strict" in options)
    from rlhf_fast.recipes.plan import plan

    for one in [getattr(config, name) for name in config.stages] if isinstance(config, RunConfig) else [config]:
        plan(one)
    return 0


def monitor(flags: Flags) -> int:
    from rlhf_fast.monitor.command import monitor

    path, as_json = Path(find_home(flags.pop("RUN_OR_LOG"), "RUN_OR_LOG ")), flags.pop("json", False)
    return monitor(path, read_settings(flags, field_kinds(Thresholds), "--"), as_text=not as_json)


def report(flags: Flags) -> int:
    from rlhf_fast.monitor.follow import report

    runs = [find_home(run, "RUN ") for run in flags["runs"]]
    output = find_home(flags["output"], "--output ") if "output" in flags else None
    report(runs, output, following="follow" in flags)
    return 0


def samples(flags: Flags) -> int:
    from rlhf_fast.monitor.browse import browse

    browse(Path(find_home(flags.pop("run"), "RUN ")), **flags)
    return 0


def merge(flags: Flags) -> int:
    from rlhf_fast.models.merge import merge

    folders = {name: find_home(flags[name], f"--{name} ") for name in ("adapter", "output_dir")}
    merge(folders["adapter"], folders["output_dir"], flags.get("dtype"))
    tell(f"merged model: {folders['output_dir']}", sys.stdout)
    return 0


def bench(flags: Flags) -> int:
    from rlhf_fast.bench.command import bench

    bench(flags)
    return 0


def installed_version() -> str:
    try:
        return importlib.metadata.version("rlhf-fast")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("no version: this checkout is not installed; `pip install -e .` installs it") from None


if __name__ == "__main__":
    sys.exit(main())
