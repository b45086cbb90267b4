"""The traceback of an unexpected exception, left in the run's folder."""

import datetime
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import rlhf_fast
from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.files import write_atomic
from rlhf_fast.recipes.output import ERROR, OutputFolder
from rlhf_fast.text import traceback_text


@contextmanager
def failure_kept(folder: str) -> Iterator[None]:
    """Inside, an exception that no message of ours explains leaves its traceback in ``folder``/error.txt, and a note on
    the exception says so. A folder in which no run has begun is left as it is."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        output = OutputFolder(Path(folder))
        if output.kind and os.environ.get("RANK", "0") == "0":  # of several processes one writes
            try:
                path = output.claim(ERROR)
                write_atomic(path, _report(error))
                error.add_note(f"This traceback is in {path}.")
            except UserError as problem:
                error.add_note(f"This traceback could not be kept: {problem}")
        raise


def _report(error: BaseException) -> str:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    versions = f"rlhf-fast {rlhf_fast.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{now}, {versions}\n\n{traceback_text(error)}\n"
