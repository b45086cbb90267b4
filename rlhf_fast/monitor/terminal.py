"""The terminal that progress and tables are printed on."""

from rich.console import Console


class Terminal(Console):
    """rich's console, which raises BrokenPipeError for a closed pipe instead of ending the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError
