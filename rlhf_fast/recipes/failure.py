"""Writes the traceback of an unexpected exception to the run's folder."""

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
    """Inside, an exception other than UserError and Interrupted writes its traceback to ``folder``/error.txt, and gets
    a note that names the file. Writes nothing if no run has begun in the folder."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        output = OutputFolder(Path(folder))
        if output.kind and os.environ.get("RANK", "0") == "0":  # only process 0 writes
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
