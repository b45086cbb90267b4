"""Numbers as the report draws and writes them."""

import math
from typing import Any

LARGEST = 1e100  # larger values, from a diverged run, are drawn as gaps; their differences could overflow


def number(value: Any) -> float | None:
    """``value`` as a float that can be drawn; None for null, text, NaN, infinity, or magnitudes of 1e100 and above."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None  # a comparison with NaN is False


def rounded(value: float | None) -> float | None:
    """Six significant digits: more than a chart shows, and a smaller page."""
    return None if value is None else float(f"{value:.6g}")


def format_number(value: float, digits: int = 4) -> str:
    """At most ``digits`` significant digits, no trailing zeros, thousands separators: ``0.0123``, ``12,345``."""
    if value != 0 and (abs(value) < 1e-4 or abs(value) >= 1e9):
        return f"{value:.2e}"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".rstrip("0").rstrip(".") if decimals else f"{value:,.0f}"


def format_value(value: Any) -> str:
    """A figure of any type; a dash for null and numbers that are not finite."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return "–" if number(value) is None else format_number(value)
    return str(value)
