"""The output of a stage: lines on the terminal, metrics, samples, trackers, the report, the final table."""

import importlib.util
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from rlhf_fast.config import StageConfig
from rlhf_fast.config_load import dump_yaml
from rlhf_fast.errors import UserError
from rlhf_fast.monitor import Progress, RunLog, print_summary, write_report, write_summary
from rlhf_fast.recipes.output import REPORT, RESOLVED, WHOLE_RUN, OutputFolder
from rlhf_fast.recipes.processes import Processes
from rlhf_fast.text import one_line, tell


class Records:
    """The output of one stage. Only process 0 writes; trackers must be called in every process."""

    def __init__(self, name: str, config: StageConfig, processes: Processes) -> None:
        self._opened = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._name, self._config, self._processes = name, config, processes
        self._folder = Path(config.output_dir)
        self._output: OutputFolder | None = None
        self._progress: Progress | None = None

    def open(self, output: OutputFolder | None, resume_step: int | None) -> None:
        """Opens the files of metrics and samples (for a resumed run, keeps their lines up to ``resume_step``), and
        writes the settings. ``output``: the stage's folder in process 0, else None."""
        self._output, self._resumed = output, resume_step is not None
        if output is not None:
            # the report too, which `rlhf-fast report` may write before the run does
            output.claim("metrics.jsonl"), output.claim("samples.jsonl"), output.claim(REPORT)
            self._log = RunLog(self._folder, resume_step=resume_step)
            dump_yaml(self._config, output.claim(output.record))
            if output.record != RESOLVED:
                output.remove(RESOLVED)  # from an earlier start with config.yaml as the --config file
        if self._config.report_to:
            if output is not None:
                output.claim("runs")
            run = {"name": self._config.run_name or self._folder.name}
            settings = {key: _flat(value) for key, value in asdict(self._config).items()}
            self._processes.accelerator.init_trackers("rlhf-fast", config=settings, init_kwargs={"wandb": run})

    def rewind(self, step: int) -> None:
        """Drops the lines of later steps, which will be repeated."""
        self._log = RunLog(self._folder, resume_step=step)

    def start_progress(self, step: int, total: int) -> None:
        self._progress = Progress(self._name, total, start=step, enabled=self._processes.main).__enter__()

    def stop_progress(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._progress is not None
        self._progress.__exit__(kind, error, trace)
        self._progress = None

    def show(self, step: int, texts: Mapping[str, str]) -> None:
        """Shows short texts next to the progress bar."""
        if self._progress is not None:
            self._progress.update(step, **texts)

    def say(self, message: str) -> None:
        if self._progress is not None:
            self._progress.say(message)
        elif self._processes.main:
            tell(one_line(message))

    def metrics(self, step: int, line: Mapping[str, float]) -> None:
        if self._output is not None:
            self._log.metrics(step, line)
        self._processes.accelerator.log(dict(line), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._output is not None:
            self._log.samples(step, rows)

    def report(self) -> None:
        """Writes report.html: that of the whole run, if this stage is part of one, else the stage's."""
        if self._output is None:
            return
        above = OutputFolder(self._folder.parent)
        if above.kind == WHOLE_RUN and self._folder.name == self._name and above.made(REPORT):
            write_report(above.path)
        else:
            write_report(self._folder)

    def close(self, figures: Mapping[str, Any], rows: Sequence[tuple[str, str, str]], steps: int) -> dict[str, Any]:
        """Writes summary and report, ends the trackers, and prints ``rows`` as a table. Returns ``figures`` with steps,
        time and memory added."""
        seconds, memory = time.perf_counter() - self._opened, peak_memory()
        whole = {**figures, "steps": steps, "seconds": round(seconds, 1), "peak_memory_gb": round(memory, 2)}
        if self._output is not None:
            write_summary(self._output.claim("summary.json").parent, self._name, whole)
        self.report()
        # not accelerate's end_training, which also ends the process group that the next stage needs
        for tracker in self._processes.accelerator.trackers:
            tracker.finish()
        resumed = ", since it was resumed" if self._resumed else ""
        place = "GPU" if torch.cuda.is_available() else "process"
        last = [
            ("time", f"{seconds / 60:.1f} min", f"set-up and evaluations included{resumed}"),
            ("peak memory", f"{memory:.1f} GB", f"of the {place}"),
        ]
        if self._processes.main:
            print_summary(f"{self._name}: {self._folder}", [*rows, *last])
        return whole


def check_trackers(config: StageConfig) -> None:
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"--report_to {tracker}: the package is not installed; run `pip install {tracker}`")


def peak_memory() -> float:
    """Peak memory in GB (10⁹ bytes): of the GPU if there is one, else this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _flat(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else str(value)
