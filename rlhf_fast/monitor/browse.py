"""`rlhf-fast samples`: the browser on a terminal, else text."""

import sys
from pathlib import Path
from typing import Literal

from rlhf_fast.errors import UserError
from rlhf_fast.monitor.samples import choose, order_of
from rlhf_fast.monitor.samples_text import print_samples

LIMIT = 20


def browse(
    path: Path,
    *,
    worst: Literal["kl", "score", "length"] | None = None,
    best: Literal["score"] | None = None,
    diff: str | None = None,
    step: int | None = None,
    prompt: str | None = None,
    plain: bool = False,
    limit: int = LIMIT,
) -> None:
    """Shows the samples of a log until the person leaves.

    Args:
        path: as in :func:`read_log`.
        worst, best: the order; the newest first without either.
        diff, step, prompt: as in :func:`choose`.
        plain: print text, as is done where standard output is no terminal.
        limit: samples printed as text at most.

    Raises:
        UserError: there are no such samples; a terminal without Textual.
    """
    if limit < 1:
        raise UserError(f"--limit must be 1 or more; got {limit}")
    order = order_of(worst, best)
    samples = choose(path, diff=diff, step=step, prompt=prompt)
    if plain or sys.stdout is None or not sys.stdout.isatty():
        print_samples(samples, order, diff=diff is not None, limit=limit)
        return
    try:
        from rlhf_fast.monitor.samples_app import SamplesApp
    except ModuleNotFoundError as error:
        raise UserError("the browser needs Textual: pip install textual, or give --plain") from error
    SamplesApp(str(path), samples, order, diff=diff is not None).run()
