"""The samples of a run as a list: chosen, put in order, and paired with another response to the same prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_fast.errors import UserError
from rlhf_fast.monitor.foreign import read_log
from rlhf_fast.monitor.numbers import number

Row = Mapping[str, Any]
KEYS = ("step", "score", "kl", "length")  # what samples are sorted by
SFT_STEP = 0  # PPO evaluates before its first step: the responses of the SFT model


@dataclass(frozen=True)
class Order:
    """By one of ``KEYS``; rows without it come last."""

    key: str = "step"
    descending: bool = True

    @property
    def words(self) -> str:
        first = {"step": "newest", "length": "longest"} if self.descending else {"step": "oldest", "length": "shortest"}
        return f"{first.get(self.key, 'highest' if self.descending else 'lowest')} {_TITLES[self.key]} first"


_TITLES = {"step": "step", "score": "score", "kl": "KL", "length": "response"}


@dataclass(frozen=True)
class Samples:
    """Samples to show.

    Attributes:
        rows: those chosen, in the order of the log.
        at: the step of the responses that they are compared with.
        others: for each of ``rows`` the response at step ``at`` to the same prompt, None where there is none.
    """

    rows: Sequence[Row]
    at: int
    others: Sequence[Row | None]

    def sorted(self, order: Order) -> list[int]:
        """Positions in ``rows``."""
        values = [number(row.get(order.key)) for row in self.rows]
        known = [position for position, value in enumerate(values) if value is not None]
        known.sort(key=lambda position: values[position] or 0.0, reverse=order.descending)
        return known + [position for position, value in enumerate(values) if value is None]


def order_of(worst: Literal["kl", "score", "length"] | None, best: Literal["score"] | None) -> Order:
    """The order that ``--worst`` and ``--best`` ask for: worst is the lowest score, the highest KL, the most tokens."""
    if worst and best:
        raise UserError("expected --worst or --best, got both: give one of them")
    if best:
        return Order(best)
    return Order(worst, descending=worst != "score") if worst else Order()


def choose(path: Path, *, diff: str | None = None, step: int | None = None, prompt: str | None = None) -> Samples:
    """The samples of the log ``path`` (as in :func:`read_log`).

    Args:
        diff: ``sft`` or a step: only samples with another response to the same prompt at that step, ``sft`` being
            step 0.
        step: samples of that step alone.
        prompt: samples whose prompt has this text in it, in upper or lower case.

    Raises:
        UserError: there are none, or none that are so.
    """
    log = read_log(path)
    if not log.samples:
        raise UserError(f"{log.path}: expected samples.jsonl beside it, as PPO writes it; this log has no samples")
    rows = [row for row in log.samples if isinstance(row.get("response"), str)]
    at = SFT_STEP if diff in (None, "sft") else _step(str(diff))
    there: dict[Any, list[Row]] = {}
    for row in rows:
        if row.get("step") == at:
            there.setdefault(row.get("prompt"), []).append(row)
    others = [_other(row, there) if row.get("step") != at else None for row in rows]
    wanted = [
        (row, other)
        for row, other in zip(rows, others, strict=True)
        if (step is None or row.get("step") == step)
        and (prompt is None or prompt.casefold() in str(row.get("prompt", "")).casefold())
        and (diff is None or other is not None)
    ]
    if not wanted:
        steps = sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})
        asked = {"--step": step, "--prompt": prompt, "--diff": diff}
        flags = " ".join(f"{flag} {value}" for flag, value in asked.items() if value is not None)
        named = ", ".join(map(str, steps[:10])) + (", ..." if len(steps) > 10 else "")
        raise UserError(f"none of the {len(rows)} samples of {log.path} matches {flags}; their steps are {named}")
    return Samples([row for row, _ in wanted], at, [other for _, other in wanted])


def _step(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"--diff must be sft or a step, a whole number; got {text!r}")
    return int(text)


def _other(row: Row, there: Mapping[Any, Sequence[Row]]) -> Row | None:
    """The response in ``there`` to the prompt of ``row``, that of the same place in the data before others."""
    same = there.get(row.get("prompt"), [])
    place = (row.get("split"), row.get("index"))
    return next(
        (other for other in same if (other.get("split"), other.get("index")) == place), same[0] if same else None
    )
