"""The monitor of a running stage: it reads what the stage logs, tells and writes verdicts, and may act on them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.config import StageConfig
from rlhf_fast.monitor import Monitor, read_steps, watch, write_verdicts
from rlhf_fast.text import one_line
from rlhf_fast.verdicts import Verdict

if TYPE_CHECKING:
    from rlhf_fast.recipes.stage import Stage

MOST_ROLL_BACKS = 3


class Watch:
    """Runs the monitor in the main process. An error in it is told once and switches it off: it never ends a run."""

    def __init__(self, thresholds: Mapping[str, float], say: Callable[[str], None]) -> None:
        self._thresholds, self._say = thresholds, say
        self._monitor: Monitor | None = None
        self._written: list[Verdict] = []
        self._metrics: dict[str, Any] = {}
        self._samples: list[Mapping[str, Any]] = []

    def open(self, folder: Path) -> None:
        """Starts with what the folder's logs have, which a resumed run goes on with."""
        self._folder = folder
        rows, samples = (self._lines(name) for name in ("metrics.jsonl", "samples.jsonl"))
        self._monitor = watch(rows, samples, self._thresholds)
        self._written = self._monitor.verdicts
        write_verdicts(folder, self._written)  # also where there is none: the run is being watched

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self._folder / name
        return read_steps(path) if path.exists() else []

    def metrics(self, line: Mapping[str, float]) -> None:
        self._metrics |= line

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._samples += rows

    def look(self, step: int) -> list[Verdict]:
        """The verdicts that are new with ``step``, which has ended."""
        found, samples = self._metrics, self._samples
        self._metrics, self._samples = {}, []
        if self._monitor is None:
            return []
        try:
            new = self._monitor.update(step, found, samples)
            for verdict in new:
                self._say(f"monitor: {verdict.told()}")
            if new:
                self.write()
        except Exception as error:
            self._say(
                f"monitor: switched off by an error of its own: {one_line(f'{type(error).__name__}: {error}', 200)}"
            )
            self._monitor = None
            return []
        return new

    def write(self) -> None:
        """Writes verdicts.json if it would change."""
        if self._monitor is not None and self._monitor.verdicts != self._written:
            self._written = self._monitor.verdicts
            write_verdicts(self._folder, self._written)


def react(stage: "Stage[StageConfig]", verdict: Verdict) -> None:
    """Does what ``monitor_actions`` says for a new verdict. All processes must call."""
    action = stage.config.monitor_actions.get(verdict.name)
    if action == "stop":
        stage.say(f"{stage.name}: stopped by the monitor after step {stage.step} ({verdict.title})")
        stage.stopped_early = True
    elif action == "lower_learning_rate":
        stage.scale_learning_rate(0.5)
    elif action == "raise_kl_coef":
        stage.values["kl_coef"] *= 2
        stage.say(f"{stage.name}: KL coefficient doubled to {stage.values['kl_coef']:.4g} ({verdict.title})")
    elif action == "roll_back":
        count = stage.values.get("roll_backs", 0)
        if count == MOST_ROLL_BACKS or not stage.roll_back(verdict.first_step):
            why = f"rolled back {count} times" if count == MOST_ROLL_BACKS else "no checkpoint from before it"
            stage.say(f"{stage.name}: stopped by the monitor after step {stage.step} ({verdict.title}; {why})")
            stage.stopped_early = True
            return
        stage.values["roll_backs"] = count + 1
        stage.scale_learning_rate(0.5)
