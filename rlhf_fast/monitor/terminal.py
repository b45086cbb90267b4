"""The terminal that progress and tables are printed on."""

from rich.console import Console


class Terminal(Console):
    """rich's console without its own way of leaving: where nobody reads any more, the write fails as any other does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError
