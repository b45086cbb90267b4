"""The stream of metrics so far, and the few statistics of it that the detectors use."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Change(NamedTuple):
    """The mean of a metric's last values beside that of its first ones.

    ``z``: the difference over its standard error, from the noise between neighbouring steps. ``since``: the first step
    of the last values.
    """

    before: float
    now: float
    z: float
    since: int

    @property
    def difference(self) -> float:
        return self.now - self.before

    @property
    def ratio(self) -> float:
        return self.now / self.before if self.before > 0 else math.inf


@dataclass
class Series:
    """The finite values of one metric, with their steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def since(self, holds: Callable[[float], bool], count: int) -> int | None:
        """The first step of the unbroken run of last values that ``holds``; None if it has fewer than ``count``."""
        length = next((i for i, value in enumerate(reversed(self.values)) if not holds(value)), len(self.values))
        return self.steps[-length] if length >= count else None

    def noise(self) -> float:
        """Standard deviation of a value around a slow trend: from the median difference between neighbours."""
        differences = [abs(after - before) for before, after in pairwise(self.values[-50:])]
        return statistics.median(differences) / 0.954 if differences else 0.0

    def change(self, window: int, back: int | None = None) -> Change | None:
        """From the first ``window`` values, or those of ``back`` values ago, to the last ones; None with too few."""
        if len(self.values) < window + (back or window):
            return None
        earlier = self.values[:window] if back is None else self.values[-back - window : -back]
        before, now = statistics.fmean(earlier), statistics.fmean(self.values[-window:])
        error = self.noise() * math.sqrt(2 / window)
        difference = now - before
        z = difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0
        return Change(before, now, z, self.steps[-window])


class History:
    """Every metric's finite values by name, and the samples of the last steps."""

    def __init__(self, samples_kept: int) -> None:
        self._series: dict[str, Series] = {}
        self._kept = samples_kept
        self.samples: list[dict[str, Any]] = []
        self.step = -1

    def add(self, step: int, metrics: Row, samples: Sequence[Row]) -> None:
        """Adds one step, later than those before. Values that are not finite numbers are gaps.

        Tensors without dimensions and numpy's numbers are numbers.
        """
        self.step = step
        for name, value in metrics.items():
            if getattr(value, "shape", None) == ():
                value = value.item()
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            series = self._series.setdefault(name, Series())
            series.steps.append(step)
            series.values.append(float(value))
        self.samples += [{"step": step, **sample} for sample in samples]
        del self.samples[: -self._kept]

    def __getitem__(self, name: str) -> Series:
        return self._series.get(name, _EMPTY)

    def last(self, name: str, count: int) -> list[float]:
        """The last values, ``count`` of them or, where there are fewer, none."""
        values = self[name].values
        return values[-count:] if len(values) >= count else []

    def first(self, name: str, count: int) -> list[float]:
        return self[name].values[:count]

    def latest(self, name: str) -> float | None:
        values = self[name].values
        return values[-1] if values else None

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._series if name.startswith(prefix)]


_EMPTY = Series()
