"""Ctrl-C, SIGTERM and SIGHUP, all alike: the first ends the run where it stands, and its last finished step is kept.

Handlers are of this process alone: one that is forked from it gets those that were there before ours.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from rlhf_fast.text import tell

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAME_PRESS_SECONDS = 1.0  # a terminal and a parent process often signal the same thing twice

_active = False
_replaced: list[Mapping[int, Any]] = []  # the handlers that were there before ours, the innermost last
_forking = threading.local()  # the mask of a thread that forks at this moment


@contextlib.contextmanager
def handling(ours: Mapping[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Inside, ``ours`` handle their signals; in the main thread alone. A process forked inside has those of before."""
    before = _replace(ours)
    try:
        yield
    finally:
        _put_back(before, before)


def _replace(ours: Mapping[int, Callable[[int, FrameType | None], None]]) -> Mapping[int, Any]:
    before = {number: signal.getsignal(number) for number in ours}
    _replaced.append(before)  # first: no fork may come between
    for number, handler in ours.items():
        signal.signal(number, handler)
    return before


def _put_back(before: Mapping[int, Any], handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # one that C installed cannot be put back
            signal.signal(number, handler)
    _replaced[:] = [other for other in _replaced if other is not before]


def _before_fork() -> None:
    """Signals wait while a child has our handlers still: one that came then would be lost."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_forked_child() -> None:
    for before in _replaced[::-1]:
        _put_back(before, before)
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_forked_child)


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
        self._before: Mapping[int, Any] = {}
        self._first: float | None = None

    def __enter__(self) -> "Interruptible":
        global _active
        if _active or threading.current_thread() is not threading.main_thread():
            return self
        heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        self._before = _replace(dict.fromkeys(heard, self._handle))
        _active = bool(self._before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        ending = self._whole_process and self._first is not None
        if self._before:
            _put_back(self._before, dict.fromkeys(self._before, signal.SIG_IGN) if ending else self._before)
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
