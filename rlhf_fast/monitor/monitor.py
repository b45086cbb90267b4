"""The monitor: reads a stream of metrics and samples, and says what goes wrong, since when, and by which signs."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.monitor.detectors import DETECTORS, Finding
from rlhf_fast.monitor.history import History, Row
from rlhf_fast.text import shown
from rlhf_fast.verdicts import KINDS, Thresholds, Verdict

SAMPLES_KEPT = 200
SAMPLES_SHOWN = 3


class Monitor:
    """Finds KL explosion, reward hacking, mode collapse and the other ``KINDS`` of ``rlhf_fast.verdicts`` in a stream.

        monitor = Monitor()
        for step in range(steps):
            ...
            for verdict in monitor.update(step, {"objective/kl": kl, "objective/scores": score}):
                print(verdict.title, verdict.reason)

    The metrics are named as in docs/metrics.md; those that are missing switch off what needs them. It audits what has
    happened and foretells nothing.

    Args:
        thresholds: name -> number, for those of ``Thresholds`` that are not to have their defaults.

    Raises:
        UserError: an unknown threshold, or a value that is no number above 0.
    """

    def __init__(self, thresholds: Mapping[str, float] | None = None) -> None:
        self._thresholds = dict(thresholds or {})
        self._at = Thresholds.of(self._thresholds)
        self._history = History(SAMPLES_KEPT)
        self._found: dict[str, tuple[Verdict, float]] = {}

    @property
    def verdicts(self) -> list[Verdict]:
        """All verdicts so far, one a name, in the order of their first steps."""
        return sorted((verdict for verdict, _ in self._found.values()), key=lambda verdict: verdict.first_step)

    def afresh(self) -> "Monitor":
        """A new monitor with the same thresholds."""
        return Monitor(self._thresholds)

    def update(self, step: int, metrics: Mapping[str, Any], samples: Sequence[Row] = ()) -> list[Verdict]:
        """Takes in one step; returns the verdicts that are new with it.

        Args:
            step: above that of the update before.
            metrics: name -> number; what is no finite number is a gap.
            samples: rows as in samples.jsonl (``prompt``, ``response``, ``score``, ``kl``), from which verdicts choose.

        Raises:
            UserError: ``step`` is not above the one before.
        """
        if step <= self._history.step:
            raise UserError(f"the monitor expected a step above {self._history.step}; got {shown(step)}")
        self._history.add(step, metrics, samples)
        new = []
        for name, detector in DETECTORS.items():
            finding = detector(self._history, self._at)
            if finding is not None and self._note(name, finding):
                new.append(self._found[name][0])
        return new

    def _note(self, name: str, finding: Finding) -> bool:
        """Makes or extends the verdict ``name``; True where it is new. It keeps the words of its strongest moment."""
        step = self._history.step
        if name not in self._found:
            confidence, samples = _confidence(finding.size), self._worst(finding, finding.since, [])
            names = list(finding.metrics)
            verdict = Verdict(name, finding.since, step, confidence, names, samples, finding.reason, KINDS[name].advice)
            self._found[name] = verdict, finding.size
            return True
        verdict, size = self._found[name]
        verdict = dataclasses.replace(
            verdict, last_step=step, samples=self._worst(finding, verdict.first_step, verdict.samples)
        )
        if finding.size > size:
            size = finding.size
            verdict = dataclasses.replace(
                verdict, confidence=_confidence(size), metrics=list(finding.metrics), reason=finding.reason
            )
        self._found[name] = verdict, size
        return False

    def _worst(self, finding: Finding, since: int, earlier: Sequence[Row]) -> list[Row]:
        """Of ``earlier`` and the samples from step ``since`` on, those that show it best, each prompt once."""
        candidates = [*earlier, *(sample for sample in self._history.samples if sample["step"] >= since)]
        chosen: dict[str, Row] = {}
        telling = [sample for sample in candidates if finding.worst(sample) > -math.inf]
        for sample in sorted(telling, key=finding.worst, reverse=True):
            chosen.setdefault(str(sample.get("prompt")), sample)
        return list(chosen.values())[:SAMPLES_SHOWN]


def _confidence(size: float) -> float:
    """0.5 at the threshold, 0.8 at twice its size."""
    return round(min(1 - 0.5 * max(size, 1.0) ** -1.3, 0.99), 2)


def watch(rows: Iterable[Row], samples: Iterable[Row] = (), thresholds: Mapping[str, float] | None = None) -> Monitor:
    """A monitor that has seen a whole log.

    Args:
        rows: the lines of metrics.jsonl, each with a ``step``; lines of one step belong together.
        samples: the lines of samples.jsonl.

    Raises:
        UserError: as :class:`Monitor`.
    """
    monitor = Monitor(thresholds)
    steps: dict[int, tuple[dict[str, Any], list[Row]]] = {}
    for row in rows:
        steps.setdefault(row["step"], ({}, []))[0].update(row)
    for sample in samples:
        if sample.get("step") in steps:
            steps[sample["step"]][1].append(sample)
    for step in sorted(steps):
        monitor.update(step, *steps[step])
    return monitor
