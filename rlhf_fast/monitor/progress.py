"""Shows a stage's progress: a bar on a terminal, occasional lines in a log file, nothing on ranks other than 0."""

import sys
from time import monotonic
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from rlhf_fast.monitor.terminal import Terminal
from rlhf_fast.text import one_line, printable, unread_allowed

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context manager that shows a stage's progress on standard error.

    Args:
        title: the name of the stage, such as ``"ppo"``.
        total: the total number of steps.
        start: steps done before (in a resumed run); the time left is estimated from later steps.
        enabled: False prints nothing (ranks other than 0).

    If standard error is not a terminal, lines are printed instead: for the first update, for the last, and between at
    most every 10 seconds: ``ppo  12/40  loss 1.234  512 tok/s  left 3:10``.
    """

    def __init__(self, title: str, total: int, *, start: int = 0, enabled: bool = True) -> None:
        self._title, self._total, self._start, self._step = title, total, start, start
        self._enabled = enabled
        self._texts: dict[str, str] = {}
        self._console = Terminal(stderr=True)
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._began = monotonic()
        self._printed_at: float | None = None
        self._printed_step: int | None = None

    def __enter__(self) -> "Progress":
        self._began = monotonic()
        # isatty instead of rich's is_terminal, which FORCE_COLOR, common in CI, turns on for log files
        if self._enabled and sys.stderr is not None and sys.stderr.isatty() and not self._console.is_dumb_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left", markup=False),
                TimeRemainingColumn(compact=True),
                # the column that shrinks in a narrow window
                TextColumn("{task.fields[texts]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._start, texts="")
            with unread_allowed(sys.stderr):
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with unread_allowed(sys.stderr):
                self._bar.stop()
        elif self._printed_step is not None and self._printed_step != self._step:
            self._print_line()  # the stage ended early

    def update(self, step: int, **texts: str) -> None:
        """``step`` steps are done. ``texts`` are shown as ``name text``, except ``speed``, whose unit is enough.

        A text stays until an update with the same name.
        """
        self._step = step
        self._texts.update(texts)
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, texts=self._joined_texts())
            return
        due = self._printed_at is None or monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES
        if due or step >= self._total:
            self._print_line()

    def say(self, message: str) -> None:
        """Print a message without breaking the bar."""
        if self._enabled:
            with unread_allowed(sys.stderr):
                self._console.print(Text(one_line(message)), soft_wrap=True)

    def _joined_texts(self) -> str:
        parts = (text if name == "speed" else f"{name} {text}" for name, text in self._texts.items())
        return printable("  ".join(parts))

    def _print_line(self) -> None:
        self._printed_at, self._printed_step = monotonic(), self._step
        parts = [self._title, f"{self._step}/{self._total}", self._joined_texts()]
        done = self._step - self._start
        if done > 0 and self._step < self._total:
            seconds = (self._printed_at - self._began) / done * (self._total - self._step)
            parts.append(f"left {clock(seconds)}")
        self.say("  ".join(part for part in parts if part))


def clock(seconds: float) -> str:
    """``3:10`` or ``1:02:05``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
