"""The memory that the C library keeps when tensors are freed."""

import ctypes

import psutil

GROWTH = 1.25  # of the resident memory, at which what is free is given back


def give_back_memory() -> None:
    """Returns freed memory to the system. glibc keeps it in fragments, which do not fit tensors of other sizes. Does
    nothing with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Heap:
    """Bounds the fragments that pile up in a run whose steps have sequences of ever other lengths.

    Memory that is given back costs page faults when it is used again, so it is given back only after the process has
    grown by a quarter since the last time.
    """

    def __init__(self) -> None:
        self._bound: float | None = None  # None: the next step says what is usual

    def after_step(self) -> None:
        resident = psutil.Process().memory_info().rss
        if self._bound is None:
            self._bound = GROWTH * resident
        elif resident > self._bound:
            give_back_memory()
            self._bound = None
