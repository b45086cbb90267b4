"""Scales, round ticks and number formats for the charts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[float, float | None]
LARGEST = 1e100  # larger values, from a diverged run, are drawn as gaps; their differences could overflow


def number(value: Any) -> float | None:
    """``value`` as a float that can be drawn; None for null, text, NaN, infinity, or magnitudes of 1e100 and above."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None  # a comparison with NaN is False


def segments(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The points split at every gap into runs of values that can be drawn."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        value = number(y)
        if value is None:
            runs.append([])
        else:
            runs[-1].append((x, value))
    return [run for run in runs if run]


def format_number(value: float, digits: int = 4) -> str:
    """At most ``digits`` significant digits, no trailing zeros, thousands separators: ``0.0123``, ``12,345``."""
    if value != 0 and (abs(value) < 1e-4 or abs(value) >= 1e9):
        return f"{value:.2e}"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".rstrip("0").rstrip(".") if decimals else f"{value:,.0f}"


def short_number(value: float) -> str:
    """Three significant digits in about seven characters, for the margin of a chart: ``0.0619``, ``12.3k``."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.1e}"
    if abs(value) >= 1e4:
        scale, letter = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k")
        return f"{format_number(value / scale, 3)}{letter}"
    return format_number(value, 3)


def round_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that divides ``span`` into at most ``count`` parts."""
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` to ``high`` to positions from ``start`` to ``end`` (SVG units)."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[tuple[float, str]]
    slot: float = 0.0  # the width of one category

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @classmethod
    def fit(
        cls,
        values: Sequence[float | None],
        start: float,
        end: float,
        *,
        ticks: int = 4,
        pad: float = 0.05,
        least_step: float = 0.0,
    ) -> "Axis":
        """An axis whose range includes all values that can be drawn.

        Args:
            pad: the share of the span left free at each end; it never extends the axis across zero.
            least_step: ticks are integer multiples of this (1 for integers, such as training steps).
        """
        known = [known for value in values if (known := number(value)) is not None] or [0.0]
        low, high = min(known), max(known)
        if high - low <= max(1e-9 * abs(low), 1e-9 * abs(high), 1e-100):  # all values are equal, or nearly
            room = 0.05 * max(abs(low), abs(high))
            low, high = (low - room, high + room) if room > 1e-90 else (0.0, 1.0)
        else:
            room = (high - low) * pad
            low = 0.0 if low >= 0 > low - room else low - room
            high = 0.0 if high <= 0 < high + room else high + room
        step = round_step(high - low, ticks)
        if least_step > 0:
            step = math.ceil(step / least_step - 1e-9) * least_step
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        labels = [(i * step, _tick_label(i * step, step, max(abs(low), abs(high)))) for i in range(first, last + 1)]
        return cls(low, high, start, end, labels)

    @classmethod
    def categories(cls, labels: Sequence[str], start: float, end: float) -> "Axis":
        """A slot for each label, centred at ``at(index)``. Shows every k-th label if all of them would overlap."""
        slot = (end - start) / len(labels)
        widest = max(len(label) for label in labels) * 6.0 + 6.0
        every = max(1, math.ceil(widest / slot))
        ticks = [(float(index), label) for index, label in enumerate(labels) if index % every == 0]
        return cls(-0.5, len(labels) - 0.5, start, end, ticks, slot)


def _tick_label(value: float, step: float, largest: float) -> str:
    """A tick's label, in one format for all ticks of an axis; ``largest`` is the axis' largest magnitude."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(step) + 1e-9)
    exponent -= not math.isclose(step / 10**exponent, round(step / 10**exponent))  # a step of 2.5 needs a digit more
    if largest >= 1e9 or step < 1e-5:
        return f"{value:.{max(0, math.floor(math.log10(abs(value)) + 1e-9) - exponent)}e}"
    if largest >= 1e6:
        return f"{value / 1e6:g}M"
    if largest >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.{max(0, -exponent)}f}"
