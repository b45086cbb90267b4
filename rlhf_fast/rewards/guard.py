"""A person's code inside our process: what it prints, what it leaves changed, how long it runs and how it fails."""

import concurrent.futures
import contextlib
import importlib
import os
import random
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.signals import handling

Say = Callable[[str], None]
SECONDS_BETWEEN_SIGNALS = 0.1
HERE = str(Path(__file__).parent)
# what stands between a recipe and a person's code
CALLERS = (HERE, *(str(module.__file__) for module in (concurrent.futures._base, contextlib, importlib, threading)))
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class TimedOut(BaseException):
    """Raised in code that runs past its limit. No Exception: ``except Exception`` in that code lets it pass."""


class ProcessExit(BaseException):
    """``os._exit`` in a person's code, which nothing there catches."""


def print_error(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def guarded(what: str, *, failed: str = "raised", say: Say = print_error, limit: float | None = None) -> Iterator[None]:
    """The block is a person's code. ``what`` and ``failed`` begin the error: "reward function f" and "raised".

    Its prints go to ``say`` line by line. Random states and the settings of ``SETTINGS`` are put back after it. It may
    run for ``limit`` seconds (in the main thread alone: other threads get no signals).

    Raises UserError for whatever it raises, SystemExit too, with the file and line, and where it runs longer;
    KeyboardInterrupt where a signal asked the run to stop, even if the code caught it.
    """
    stopped: list[int] = []
    lines = Lines(say, sys.stdout)
    try:
        with redirect_stdout(lines), unchanged(), stops_noted(stopped), time_limit(limit):  # type: ignore[type-var]
            with no_way_out(), this_process():
                yield
    except BaseException as error:
        if not stopped:
            raise UserError(_message(error, what, failed, limit)) from error
    finally:
        lines.end()
    if stopped:
        raise KeyboardInterrupt


@contextmanager
def this_process() -> Iterator[None]:
    """A process that the block forks ends where the block does, as a script would: it is not the run."""
    process, code = os.getpid(), 0
    try:
        yield
    except BaseException as error:
        if os.getpid() == process:
            raise
        code = _exit_code(error)
    if os.getpid() != process:
        os._exit(code)


@contextmanager
def no_way_out() -> Iterator[None]:
    """``os._exit`` raises in the block, but for processes that it forks: the run would end without a word."""
    process, leave = os.getpid(), os._exit

    def refuse(status: int) -> NoReturn:
        if os.getpid() != process:
            leave(status)
        raise ProcessExit(f"it called os._exit({status})")

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = leave


def _exit_code(error: BaseException) -> int:
    """What Python ends a process with, and prints, for an exception that nobody caught."""
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _message(error: BaseException, what: str, failed: str, limit: float | None) -> str:
    if isinstance(error, TimedOut):
        return (
            f"{what} was still running after {limit:g} seconds{_place(error)}; raise the limit, --reward_timeout, or "
            "set it to null for none"
        )
    return f"{what} {failed} {describe(error)}"


def describe(error: BaseException) -> str:
    """The exception on one line, with the place in the person's code where it was raised."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # the text of an exception is the person's code too
        text = ""
    return type(error).__name__ + (f": {text}" if text else "") + _place(error)


def _place(error: BaseException) -> str:
    """`` (FILE, line N)``: the innermost line outside installed libraries, or of a library where there is no other."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if not frame.filename.startswith((*CALLERS, "<frozen"))]
    inside = [frame for frame in inside if not frame.filename.startswith(LIBRARIES)] or inside
    return f" ({inside[-1].filename}, line {inside[-1].lineno})" if inside else ""


class Lines:
    """A text stream that hands whole lines to ``say``; for the rest it is the stream whose place it takes."""

    def __init__(self, say: Say, stream: Any) -> None:
        self._say, self._stream, self._rest, self._lock = say, stream, "", threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._say(line)
        return len(text)

    def writelines(self, texts: Iterator[str]) -> None:
        for text in texts:
            self.write(text)

    def flush(self) -> None:
        """Nothing: a line goes out when it is whole."""

    def isatty(self) -> bool:
        return False

    def end(self) -> None:
        if self._rest:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _gpu_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


RANDOM: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (random.getstate, random.setstate),
    (numpy.random.get_state, numpy.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (_gpu_states, torch.cuda.set_rng_state_all),
]
SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (os.getcwd, os.chdir),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
]


@contextmanager
def unchanged() -> Iterator[None]:
    """Puts random states and process-wide settings back: a judge that seeds, or needs no gradients, changes no run."""
    states, settings = [get() for get, _ in RANDOM], [get() for get, _ in SETTINGS]
    try:
        yield
    finally:
        for (_, put), state in zip(RANDOM, states, strict=True):
            put(state)
        for (get, put), setting in zip(SETTINGS, settings, strict=True):
            if get() != setting:
                put(setting)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def stops_noted(stopped: list[int]) -> Iterator[None]:
    """Notes in ``stopped`` the signals that ask the run to stop. A KeyboardInterrupt without one is the code's own."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if _in_main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    old = {int(number): handler for number, handler in handlers.items() if callable(handler)}

    def noted(number: int, frame: Any) -> None:
        stopped.append(number)
        old[number](number, frame)

    with handling(dict.fromkeys(old, noted)):
        yield


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimedOut in the block after ``seconds``, in the main thread; no limit in others.

    By a signal, which breaks a sleep, a lock and a read from a socket as well as a loop. Not SIGALRM: maths verifiers
    use that themselves. A thread sends it; where the code keeps the interpreter's lock, such as a regular expression
    that backtracks for ever, no thread can run, and the process's CPU timer sends it.
    """
    if seconds is None or not _in_main_thread():
        yield
        return
    deadline, main, ended, over = time.monotonic() + seconds, threading.get_ident(), False, threading.Event()

    def check(number: int, frame: Any) -> None:
        left = deadline - time.monotonic()
        if ended:
            return
        if left > 0:  # several threads use up CPU time faster than the clock runs
            signal.setitimer(signal.ITIMER_PROF, left)
        else:
            raise TimedOut

    def remind() -> None:
        wait = seconds
        while not over.wait(wait):  # again and again: a bare `except:` may have caught it
            signal.pthread_kill(main, signal.SIGPROF)
            wait = SECONDS_BETWEEN_SIGNALS

    with handling({signal.SIGPROF: check}):
        old_timer = signal.setitimer(signal.ITIMER_PROF, seconds)
        thread = threading.Thread(target=remind, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended = True  # before any call: from here on a late signal does nothing
            over.set()
            thread.join()
            signal.setitimer(signal.ITIMER_PROF, *old_timer)
