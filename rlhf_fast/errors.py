"""The one error that a person is meant to read: the command line prints it as one line, without a traceback."""

# What torch says where memory runs out and it raises a plain RuntimeError.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class UserError(Exception):
    """Something outside the code is wrong (a file, a flag, a column, a token, the disk).

    The message is one line: what was expected, what came (naming file, line, column, flag or token), what to do.
    """


class OutOfMemory(UserError):
    """The machine's memory does not hold what a setting asks for; the message names the setting."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch raises where a GPU or this process gets no more memory, and for Python's own MemoryError.

    torch has a class for the GPU (known by its name, so that torch is not imported here) and else texts alone.
    """
    said = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or said


class Interrupted(Exception):
    """A person stopped the run. The message says where it stands and how to go on; it is printed as it is."""


def nearest(word: str, choices: list[str]) -> str:
    """`` (did you mean 'prompt'?)`` where one of ``choices`` is close to ``word``, else an empty string."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
