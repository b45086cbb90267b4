"""The monitor in a Trainer of transformers or TRL: ``callbacks=[MonitorCallback()]``.

Import it from here: the rest of ``rlhf_fast.monitor`` does not need transformers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_fast.monitor.foreign_names import finite, kind_of, renamed
from rlhf_fast.monitor.monitor import Monitor
from rlhf_fast.text import one_line, tell
from rlhf_fast.verdicts import Verdict


class MonitorCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked
    """Gives a trainer's logs to the monitor, under our metric names, and prints each new verdict as one line.

    A monitor or an action that raises ends no run: the error is printed once, and it is not called again. In a run of
    several processes the first one watches, for all of them.

    What is logged at a step reaches the monitor when the next one begins, so that an evaluation is part of its step.

    Args:
        monitor: None: ``Monitor()``.
        actions: functions that are called with each new verdict.
        stop: end the training at the first verdict, after the step that follows.
    """

    def __init__(
        self, monitor: Monitor | None = None, actions: Sequence[Callable[[Verdict], object]] = (), *, stop: bool = False
    ) -> None:
        self.monitor, self._actions, self._stop = monitor or Monitor(), list(actions), stop
        self._names: set[str] = set()
        self._step = 0
        self._held: dict[str, float] | None = None  # logged at this step and not yet given to the monitor
        self._failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if state.global_step < self._step:  # another training with the same callback
            self.monitor, self._step, self._held = self.monitor.afresh(), state.global_step, None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if self._step != state.global_step:
            self._give(state, control)
        self._step = state.global_step
        # an evaluation logs at the step that has been logged before
        self._held = (self._held or {}) | finite(logs or {})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._give(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._give(state, control)

    def _give(self, state: TrainerState, control: TrainerControl) -> None:
        """The metrics of a step, which is over, to the monitor."""
        if self._held is None:
            return
        metrics, self._held = self._held, None
        found = [state.is_world_process_zero and self._watch(self._step, metrics)]
        if self._stop:
            broadcast_object_list(found)  # every process logs at the same steps, and all must stop at the same one
            control.should_training_stop = control.should_training_stop or found[0]

    def _watch(self, step: int, numbers: Mapping[str, float]) -> bool:
        """Whether there are new verdicts."""
        if self._failed:
            return False
        self._names |= set(numbers)
        try:
            verdicts = self.monitor.update(step, renamed(kind_of(self._names), numbers))
        except Exception as error:  # somebody else's training must go on
            self._failed = True
            _tell_failure("the monitor", step, error)
            return False
        for verdict in verdicts:
            tell(one_line(f"rlhf-fast: {verdict.told()}"))
            for action in list(self._actions):
                try:
                    action(verdict)
                except Exception as error:
                    self._actions.remove(action)
                    _tell_failure("an action of the monitor", step, error)
        return bool(verdicts)


def _tell_failure(who: str, step: int, error: Exception) -> None:
    what = f"{type(error).__name__}: {error}"
    tell(one_line(f"rlhf-fast: {who} failed at step {step} and is off from now on: {what}"))
