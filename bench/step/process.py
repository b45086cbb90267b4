"""One contestant in a process of its own: its output kept, its peak memory watched."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

WATCH_SECONDS = 0.1


class Failed(Exception):
    """A contestant that did not end well; the message is one line."""


def run(command: Sequence[str], log: Path, environment: Mapping[str, str], limit: float) -> float:
    """Runs ``command`` with its output in ``log``; returns the peak resident memory in GB, its children's
    included (Linux: VmHWM of /proc). Raises Failed where it ends with an error or runs for more than ``limit``
    seconds."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
        try:
            peak, seen, end = 0, {process.pid}, time.monotonic() + limit
            while process.poll() is None and time.monotonic() < end:
                family = descendants(process.pid)
                # a child counts from its second sighting: before exec it still has its parent's memory
                peak = max(peak, sum(high_water(pid) for pid in family & seen))
                seen = family
                time.sleep(WATCH_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        late = f"stopped after {limit:g} s" if process.returncode == -signal.SIGKILL else ""
        raise Failed(late or (lines[-1].strip()[:300] if lines else f"exit code {process.returncode}"))
    return peak / 1e9


def descendants(pid: int) -> set[int]:
    """``pid`` and the processes below it that are alive."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return {pid}


def high_water(pid: int) -> int:
    """The process's peak resident memory so far, in bytes; 0 once it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0
