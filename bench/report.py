"""The results as text: lines for the terminal, tables for the docs, Markdown with every figure, the verdict."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_fast.bench import peers
from rlhf_fast.bench.workload import COMPILED, EAGER, OURS

Row = dict[str, Any]


def lines(row: Row) -> str:
    """One workload for the terminal."""
    told = [f"{row['name']}  (backend: {row['backend']})"]
    for name in row["contestants"]:
        told.append(
            "  ".join(f"{cell:>{width}}" for cell, width in zip(cells(row, name), WIDTHS, strict=True)).rstrip()
        )
    told += [f"  {note}" for note in notes(row)]
    told += [f"  mark: {mark['mark']}: {reached(mark)}" for mark in row["marks"]]
    return "\n".join(told)


def notes(row: Row) -> list[str]:
    """Contestants that did not take part, and notes on GPU figures."""
    told = [f"{name}: {reason}" for name, reason in row["missing"].items()]
    on_gpu = {name: entry for name, entry in row["contestants"].items() if "host_us" in entry}
    for name, entry in on_gpu.items():
        if entry["not_captured"]:
            told.append(f"{name}: timed as it is called, gaps between launches included: {entry['not_captured']}")
    if on_gpu:
        host = ", ".join(f"{name} {milliseconds(entry['host_us'] / 1e3)}" for name, entry in on_gpu.items())
        told.append(f"host time of a call: {host}")
        told.append(f"our first calls, compiling included: {on_gpu[OURS]['first_calls_s']:.2g} s")
    return told


HEADINGS = ("contestant", "time", "spread", "times ours", "rate", "of the ceiling", "extra memory", "error")
WIDTHS = (28, 9, 9, 8, 13, 6, 9, 8)


def cells(row: Row, name: str) -> tuple[str, ...]:
    """A contestant's figures under HEADINGS."""
    entry = row["contestants"][name]
    share = of_ceiling(row, name)
    return (
        name,
        milliseconds(entry["ms"]),
        f"± {milliseconds(entry['spread_ms'])}",
        "" if name == OURS else f"{times(entry['times_ours'])}",
        rate(entry),
        "" if share is None or name == row["ceiling"] else f"{share:.0%}",
        "" if entry["extra_mb"] is None else f"{entry['extra_mb']:,.1f} MB",
        f"{max(entry['error'].values()):.1g}" if entry["error"] else "",
    )


def of_ceiling(row: Row, name: str) -> float | None:
    """The contestant's rate as a share of the ceiling's."""
    entry, ceiling = row["contestants"][name], row["contestants"].get(row["ceiling"], {})
    found = [entry[unit] / ceiling[unit] for unit in ("gb_per_s", "gflop_per_s") if unit in entry and unit in ceiling]
    return found[0] if found else None


def milliseconds(value: float) -> str:
    return f"{value * 1e3:.3g} us" if value < 0.9995 else f"{value:,.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def times(value: float) -> str:
    return f"{value:.0f}x" if value >= 100 else f"{value:.3g}x" if value >= 10 else f"{value:.2f}x"


def rate(entry: Row) -> str:
    if "gb_per_s" in entry:
        return f"{entry['gb_per_s']:.3g} GB/s"
    return f"{entry['gflop_per_s']:.3g} GFLOP/s" if "gflop_per_s" in entry else ""


def reached(mark: Row) -> str:
    return "not measured" if mark["met"] is None else f"{mark['value']:.3g}, {'met' if mark['met'] else 'MISSED'}"


# ---- Markdown ------------------------------------------------------------------------------------------------------


def summary(results: Row) -> str:
    """The tables of docs/benchmarks.md: one line per workload, and one per mark."""
    rows = results["rows"]
    work = [
        (
            work_name(row),
            milliseconds(row["contestants"][OURS]["ms"]),
            beside(row, EAGER),
            beside(row, COMPILED),
            "<br>".join(f"{name} {beside(row, name)}" for name in others(row)),
            ceiling(row),
            memory(row),
            cells(row, OURS)[-1],
        )
        for row in rows
    ]
    headings = ("work", OURS, EAGER, COMPILED, "others", "ceiling", "extra memory", "error")
    marks = [
        ("" if number else work_name(row), mark["mark"], reached(mark))
        for row in rows
        for number, mark in enumerate(row["marks"])
    ]
    parts = [where(results), table(headings, work)]
    return "\n\n".join(parts + ([table(("work", "mark", "reached"), marks)] if marks else []))


def details(results: Row) -> str:
    """Every figure: one table per workload."""
    parts = [where(results)]
    for row in results["rows"]:
        parts.append(f"### {row['name']} ({row['backend']})")
        parts.append(table(HEADINGS, [cells(row, name) for name in row["contestants"]]))
        listed = [*notes(row), *(f"{mark['mark']}: {reached(mark)}" for mark in row["marks"])]
        if listed:
            parts.append("\n".join(f"- {each}" for each in listed))
    return "\n\n".join(parts) + "\n"


def processor(machine: dict[str, Any]) -> str:
    return f"{machine['cores']} core{'' if machine['cores'] == 1 else 's'} of {machine['cpu']}"


def where(results: Row) -> str:
    machine, versions = results["machine"], results["machine"]["versions"]
    device = machine["gpu"] if results["device"] == "cuda" else processor(machine)
    packages = ("torch", *(("triton",) if results["device"] == "cuda" else ()), *peers.PACKAGES)
    told = ", ".join(f"{name} {versions[name]}" for name in packages if versions.get(name))
    if "ceilings" in results:
        copy, product = results["ceilings"]["copy_gb_per_s"], results["ceilings"]["bf16_product_tflop_per_s"]
        told += f"; at best it copies {copy:,.0f} GB/s and multiplies bf16 matrices at {product:,.0f} TFLOP/s"
    small = " Quick sizes: the marks are meant for the full ones." if results["quick"] else ""
    return f"{device}; {told}. Medians of runs in turn; (2x) is twice our time.{small}"


def table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ("---",) * len(headings), *rows))


def work_name(row: Row) -> str:
    return f"`{row['op']}`{row['name'].removeprefix(row['op'])}"


def beside(row: Row, name: str) -> str:
    """A contestant's time, and that time divided by ours; empty if it did not take part."""
    entry = row["contestants"].get(name)
    return "" if entry is None else f"{milliseconds(entry['ms'])} ({times(entry['times_ours'])})"


def others(row: Row) -> Iterator[str]:
    return (name for name in row["contestants"] if name not in (OURS, EAGER, COMPILED, row["ceiling"]))


def memory(row: Row) -> str:
    """Ours, and that of torch eager if it is at least 10 MB."""
    ours, eager = (row["contestants"].get(name, {}).get("extra_mb") for name in (OURS, EAGER))
    if ours is None:
        return ""
    return f"{ours:,.1f} MB" + (f"<br>torch eager {eager:,.0f} MB" if eager and eager >= 10 else "")


def ceiling(row: Row) -> str:
    share = of_ceiling(row, OURS)
    return "" if share is None else f"{share:.0%} of {row['ceiling']}"


# ---- the verdict of a whole run -------------------------------------------------------------------------------------


def verdict(results: Row) -> str:
    """One line per workload with its marks, the workloads without figures, and the totals."""
    told = [where(results)]
    for row in results["rows"]:
        share, ours = of_ceiling(row, OURS), row["contestants"][OURS]
        told.append(
            f"{row['name']:<90} {milliseconds(ours['ms']):>9}"
            + (f"  {share:.0%} of {row['ceiling']}" if share is not None else "")
        )
        told += [f"    {mark['mark']}: {reached(mark)}" for mark in row["marks"]]
    told += [f"{name}: FAILED: {reason}" for name, reason in results["failed"].items()]
    told += [f"{name}: not reached" for name in results["pending"]]
    marks = Counter(mark["met"] for row in results["rows"] for mark in row["marks"])
    told.append(
        f"workloads: {len(results['rows'])} measured, {len(results['failed'])} failed, "
        f"{len(results['pending'])} not reached; "
        f"marks: {marks[True]} met, {marks[False]} MISSED, {marks[None]} not measured"
    )
    return "\n".join(told)
