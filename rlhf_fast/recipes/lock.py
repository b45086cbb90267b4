"""A lock that allows one run per folder. The system releases it when the process ends, even by a crash."""

import errno
import json
import os
import socket
import stat
import weakref
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.text import one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".rlhf-fast.lock"


class FolderLock:
    """Held until ``release``, until no reference to it is left, or until the process ends."""

    def __init__(self, folder: str, handle: int) -> None:
        self._folder, self._handle = folder, handle
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
        _held[folder] = self

    def release(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            _held.pop(self._folder, None)
            os.close(handle)

    def __del__(self) -> None:
        self.release()


_held: "weakref.WeakValueDictionary[str, FolderLock]" = weakref.WeakValueDictionary()


def _in_forked_child() -> None:
    """Releases the locks in a forked child, which would otherwise keep them after the run has ended."""
    for held in list(_held.values()):
        held.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


def hold(folder: Path, say: Callable[[str], None]) -> FolderLock | None:
    """Locks an existing folder. Returns None, with a message, if the file system has no locks. If this process holds
    the lock already, returns that one.

    Raises UserError, naming the process, if another one holds it.
    """
    own = _held.get(os.path.realpath(folder))
    if own is not None:
        return own
    handle = _try(folder, os.O_RDWR | os.O_CREAT, say)
    if handle is None:
        return None
    try:
        return FolderLock(os.path.realpath(folder), handle)
    except OSError as error:
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise UserError(f"cannot write {folder / LOCK}: {error.strerror}; {advice}, or name another folder") from error


def check_free(folder: Path) -> None:
    """Raises UserError if another process holds the lock. Creates no files."""
    if os.path.realpath(folder) in _held or not os.path.lexists(folder / LOCK):
        return
    handle = _try(folder, os.O_RDWR, say=lambda _: None)
    if handle is not None:
        os.close(handle)


def _try(folder: Path, flags: int, say: Callable[[str], None]) -> int | None:
    path = folder / LOCK
    if fcntl is None:
        say(f"{folder}: this system has no file locks; see to it yourself that no second run writes there")
        return None
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"cannot open the lock file {path}: {error.strerror}; mend that, or move it away") from error
    if not _is_lock(handle):
        os.close(handle)
        raise UserError(f"{path} is no lock file that a run made, and runs keep one of that name: move it away")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(handle)
        os.close(handle)
        raise UserError(
            f"{folder} is in use by another run ({holder}): wait for it, stop it, or name another --output_dir"
        ) from None
    except OSError as error:  # some network file systems
        os.close(handle)
        say(f"{folder}: no lock here ({error.strerror}); see to it yourself that no second run writes there")
        return None
    return handle


def _is_lock(handle: int) -> bool:
    """Whether the file is a lock file: a regular file without other hard links, empty or with a holder in it. Any other
    file must not be overwritten."""
    status = os.fstat(handle)
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and (status.st_size == 0 or _read(handle) is not None)


def _read(handle: int) -> dict[str, Any] | None:
    try:
        found = json.loads(os.pread(handle, 1000, 0))
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() == {"process", "host", "since"} else None


def _holder(handle: int) -> str:
    found = _read(handle)
    if found is None:
        return "a process that has just begun"
    who = f"process {found['process']} on {found['host']}, since {found['since']}"
    return one_line(who if _alive(found) else f"a child of {who}, which has ended itself", 200)


def _alive(found: dict[str, Any]) -> bool:
    """False if the process was on this machine and has ended; then a child that it forked holds the lock."""
    if found["host"] != socket.gethostname() or not isinstance(found["process"], int):
        return True
    try:
        os.kill(found["process"], 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # such as another user's process
        return True
    return True
