"""Ctrl-C, SIGTERM and SIGHUP, all alike: the first ends the run where it stands, and its last finished step is kept."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from rlhf_fast.text import tell

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAME_PRESS_SECONDS = 1.0  # a terminal and a parent process often signal the same thing twice

_active = False


class Interruptible:
    """Inside, the first signal raises KeyboardInterrupt in the main thread; repeats within a second are the same press.

    A later one raises it again, out of whatever the first is still finishing; one more ends the process as the system
    does. A signal that was ignored before (nohup) stays ignored. Inside another Interruptible, or in another thread,
    this does nothing.

    Args:
        whole_process: the process ends after the block. Once interrupted, it then ignores further signals, so that
            none of them breaks into Python's own shutting down.
    """

    def __init__(self, *, whole_process: bool = False) -> None:
        self._whole_process = whole_process
        self._before: dict[int, Any] = {}
        self._first: float | None = None

    def __enter__(self) -> "Interruptible":
        global _active
        if _active or threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):
                self._before[number] = before
                signal.signal(number, self._handle)
        _active = bool(self._before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        ending = self._whole_process and self._first is not None
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if ending else before)
        if self._before:
            _active = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first < SAME_PRESS_SECONDS:
            return
        else:
            signal.signal(number, signal.SIG_DFL)
            tell("interrupted again: leaving at once")
        raise KeyboardInterrupt
