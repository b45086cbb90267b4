"""``rlhf-fast report``: writes the page of a run or of several, once or again whenever a run's files change."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.files import cannot_write
from rlhf_fast.monitor.report import GENERATOR, write_page
from rlhf_fast.monitor.runs import READ, has_ended, settings_file, stage_folders
from rlhf_fast.text import tell

SECONDS_BETWEEN_LOOKS = 2.0


def report(runs: Sequence[str | Path], output: str | Path | None = None, *, following: bool = False) -> None:
    """Writes the page of the runs in these folders, and says where it is.

    Args:
        output: the page; None: ``report.html`` in the folder of the only run, ``comparison.html`` here of several.
        following: writes it again whenever the files change, until each run's last stage has its figures.

    Raises:
        UserError: a folder contains no run; ``output`` is somebody else's file; a file is broken.
        Interrupted: Ctrl-C ended the following.
    """
    folders = [Path(run) for run in runs]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"expected {folder} to be the output folder of a run; there is no such folder")
    path = Path(output or (folders[0] / "report.html" if len(folders) == 1 else "comparison.html"))
    check_ours(path)
    if following:
        _follow(folders, path)
    else:
        _write(folders, path)
        tell(f"report: {path}", sys.stdout)


def check_ours(path: Path) -> None:
    """UserError where ``path`` is there and is no report, so that nobody's file is written over."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            start = file.read(2000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; give another --output") from error
    if GENERATOR not in start and ": run report</title>" not in start:
        raise UserError(f"{path} is there already and is no report of a run: move it, or give another --output")


def _follow(folders: Sequence[Path], path: Path) -> None:
    seen: dict[Path, tuple[int, int]] = {}
    try:
        if not all(map(stage_folders, folders)):
            tell("report: waiting for the first line of metrics; Ctrl-C ends this", sys.stdout)
        while not all(map(stage_folders, folders)):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        tell(f"report: {path} follows the run; Ctrl-C ends this", sys.stdout)
        while True:
            now, ended = _state(folders, path), all(map(has_ended, folders))
            if now != seen or ended:
                _write(folders, path, reload=not ended)
                seen = _state(folders, path)
            if ended:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        if all(map(stage_folders, folders)):
            _write(folders, path)  # one that does not reload itself
        raise Interrupted(f"report: no longer following; {path} has the run up to now") from None
    tell(f"report: the run has ended: {path}", sys.stdout)


def _write(folders: Sequence[Path], path: Path, *, reload: bool = False) -> None:
    """Writes the page under a name of this process first: the run writes its own at the same time."""
    own = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_page(folders, own, reload=reload)
        os.replace(own, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        own.unlink(missing_ok=True)


def _state(folders: Sequence[Path], path: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of each file that the page is made from, and of the page, which the run itself writes as well."""
    names = [where / name for folder in folders for where in stage_folders(folder).values() for name in READ]
    found = {}
    for name in [*names, *map(settings_file, folders), path]:
        with suppress(FileNotFoundError):
            about = name.stat()
            found[name] = (about.st_size, about.st_mtime_ns)
    return found
