"""The monitor of a running stage: it reads what the stage logs, tells and writes verdicts, and may act on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.config import StageConfig
from rlhf_fast.monitor import Monitor, Verdict, read_steps, watch, write_verdicts
from rlhf_fast.text import one_line

if TYPE_CHECKING:
    from rlhf_fast.recipes.stage import Stage

MOST_ROLL_BACKS = 3
Row = Mapping[str, Any]


class Watch:
    """Runs the monitor in the main process. An error in it is told once and switches it off: it never ends a run."""

    def __init__(self, thresholds: Mapping[str, float], say: Callable[[str], None]) -> None:
        self._thresholds, self._say = thresholds, say
        self._monitor: Monitor | None = None
        self._failed = False
        self._acted_on: list[Verdict] = []
        self._written: list[Verdict] = []
        self._logged: dict[int, tuple[dict[str, Any], list[Row]]] = {}  # step -> metrics and samples not yet looked at

    def open(self, folder: Path, acted_on: Sequence[Row]) -> None:
        """Starts with what the folder's logs have, from which a resumed run or one that was rolled back goes on.

        ``acted_on``: the verdicts, as JSON, for which the run was rolled back; the logs no longer show them.
        """
        self._folder = folder
        if self._failed:
            return
        try:
            rows, samples = (self._lines(name) for name in ("metrics.jsonl", "samples.jsonl"))
            self._monitor = watch(rows, samples, self._thresholds)
            self._acted_on = [Verdict(**entry) for entry in acted_on]
            self._written = self._all()
            for verdict in self._monitor.verdicts:
                known = f"{verdict.title}, since step {verdict.first_step}"
                self._say(f"monitor: known from before: {known}; it is not acted on again")
            write_verdicts(folder, self._written)  # also where there is none: the run is being watched
        except Exception as error:
            self._fail(error)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self._folder / name
        return read_steps(path) if path.exists() else []

    def metrics(self, step: int, line: Mapping[str, float]) -> None:
        self._logged.setdefault(step, ({}, []))[0].update(line)

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        self._logged.setdefault(step, ({}, []))[1].extend(rows)

    def look(self) -> list[Verdict]:
        """The verdicts that are new with what was logged since the last call; all steps up to now have ended."""
        logged, self._logged = self._logged, {}
        if self._monitor is None:
            return []
        new: list[Verdict] = []
        try:
            for step in sorted(logged):
                new += self._monitor.update(step, *logged[step])
            for verdict in new:
                self._say(f"monitor: {verdict.told()}")
            if new:
                self.write()
        except Exception as error:
            self._fail(error)
            return []
        return new

    def write(self) -> None:
        """Writes verdicts.json if it would change."""
        if self._monitor is not None and self._all() != self._written:
            self._written = self._all()
            write_verdicts(self._folder, self._written)

    def _all(self) -> list[Verdict]:
        return [*self._acted_on, *(self._monitor.verdicts if self._monitor is not None else [])]

    def _fail(self, error: Exception) -> None:
        self._say(f"monitor: switched off by an error of its own: {one_line(f'{type(error).__name__}: {error}', 200)}")
        self._monitor, self._failed = None, True


def react(stage: "Stage[StageConfig]", verdicts: Sequence[Verdict]) -> None:
    """Does what ``monitor_actions`` says for the verdicts that are new with a step. All processes must call.

    Of several that ask for a roll-back the one that began first is followed.
    """
    actions = {verdict.name: stage.config.monitor_actions.get(verdict.name) for verdict in verdicts}
    for verdict in verdicts:
        if actions[verdict.name] == "stop":
            _stop(stage, verdict.title)
        elif actions[verdict.name] == "lower_learning_rate":
            stage.scale_learning_rate(0.5)
        elif actions[verdict.name] == "raise_kl_coef":
            stage.values["kl_coef"] *= 2
            stage.say(f"{stage.name}: KL coefficient doubled to {stage.values['kl_coef']:.4g} ({verdict.title})")
    back = [verdict for verdict in verdicts if actions[verdict.name] == "roll_back"]
    if back and not stage.stopped_early:
        _roll_back(stage, min(back, key=lambda verdict: verdict.first_step))


def _roll_back(stage: "Stage[StageConfig]", verdict: Verdict) -> None:
    earlier = stage.values.get("rolled_back", [])
    if len(earlier) == MOST_ROLL_BACKS:
        _stop(stage, f"{verdict.title}; rolled back {MOST_ROLL_BACKS} times")
    # a step's metrics are of the policy before its update: the one that shows the failure is that of the step before
    elif stage.roll_back(verdict.first_step - 1, [*earlier, asdict(verdict)]):
        stage.scale_learning_rate(0.5)
    else:
        _stop(stage, f"{verdict.title}; no checkpoint from before it to roll back to")


def _stop(stage: "Stage[StageConfig]", why: str) -> None:
    stage.values["stopped_by_monitor"] = why
    stage.say(f"{stage.name}: stopped by the monitor after step {stage.step} ({why})")
    stage.stopped_early = True


def outcome(stage: "Stage[StageConfig]") -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """What the monitor did to the run, as figures of summary.json and as rows of the final table."""
    figures: dict[str, Any] = {}
    if "stopped_by_monitor" in stage.values:
        after = f"after step {stage.step} of {stage.total}"
        figures["stopped_by_monitor"] = {"value": after, "note": stage.values["stopped_by_monitor"]}
    back = stage.values.get("rolled_back", [])
    if back:
        why = ", ".join(f"{Verdict(**entry).title} from step {entry['first_step']}" for entry in back)
        figures["rolled_back"] = {"value": f"{len(back)} times", "note": why}
    return figures, [(name.replace("_", " "), entry["value"], entry["note"]) for name, entry in figures.items()]
