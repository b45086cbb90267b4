"""What reward functions learn of the run, and what they log of themselves: TRL's arguments beside the data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerState

from rlhf_fast.rewards.guard import Say, print_error


@dataclass
class RunView:
    """One call of the functions.

    Attributes:
        count: completions of the call.
        state: its ``global_step`` is the number of finished steps; max_steps and epoch are set too.
        say: prints a line of the functions' output.
        metrics: what ``log_metric(name, value)`` was given, by name.
        extras: what ``log_extra(column, values)`` was given, by column, one value a completion.
    """

    count: int
    state: TrainerState = field(default_factory=TrainerState)
    say: Say = print_error
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self.count:
            raise ValueError(f"log_extra({column!r}) takes one value a completion: {self.count}, got {len(values)}")
        self.extras[str(column)] = list(values)

    def arguments(self) -> dict[str, Any]:
        return {"trainer_state": self.state, "log_extra": self.log_extra, "log_metric": self.log_metric}
