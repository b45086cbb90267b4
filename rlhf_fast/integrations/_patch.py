"""Rebinds a peer's functions to ours, wherever they have been imported already, and puts the peer's own back."""

import contextlib
import functools
import importlib.metadata
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch


class Replacement(NamedTuple):
    target: str  # the peer's name with its module, such as "trl.trainer.utils.selective_log_softmax"
    function: Callable[..., Any]  # ours, with the peer's signature
    method: str = ""  # the name is a class, of which the peer calls only this
    everywhere: bool = True  # False: under this name alone, not where other modules have imported the same object


class Step(NamedTuple):
    """What ``strict`` watches."""

    target: str  # the method of the peer that does one training step
    function: Callable[..., Any]  # which of ours it must call
    expected: Callable[[Any], bool]  # whether the step of this object has to


class Report(NamedTuple):
    """The result of ``patch``."""

    peer: str  # name and version
    replaced: dict[str, list[str]]  # function of ours -> the names that lead to it now
    left: dict[str, str]  # what the peer still computes -> why
    calls: Counter[str]  # function of ours -> calls of the peer since the patch; one in a compiled graph counts once


class Patch:
    """The replacements for one peer. ``versions``: the oldest and the newest minor version tested, such as "1.15"."""

    def __init__(
        self,
        peer: str,
        versions: tuple[str, str],
        replacements: Sequence[Replacement],
        left: Mapping[str, str],
        step: Step,
    ) -> None:
        self._peer, self._versions, self._replacements, self._left, self._step = (
            peer,
            versions,
            replacements,
            left,
            step,
        )
        self._undo: list[Callable[[], object]] = []
        self._report: Report | None = None

    def patch(self, strict: bool = False) -> Report:
        """Makes the peer call our functions, modules that are imported later included. A second call starts anew.

        Args:
            strict: a training step that should reach our functions and does not raises RuntimeError.

        Raises:
            ImportError: the peer is not installed, or its version is not among those tested.
        """
        self.unpatch()
        report = Report(f"{self._peer} {self._version()}", {}, dict(self._left), Counter())
        for replacement in self._replacements:
            self._replace(replacement, report)
        if strict:
            self._watch(report)
        self._report = report
        return report

    def unpatch(self) -> None:
        """Puts back what ``patch`` replaced."""
        while self._undo:
            self._undo.pop()()
        self._report = None

    @contextlib.contextmanager
    def patched(self, strict: bool = False) -> Iterator[Report]:
        """``patch`` for the time of a with statement."""
        try:
            yield self.patch(strict)
        finally:
            self.unpatch()

    def report(self) -> Report:
        """What is replaced now, and the calls so far. Raises RuntimeError where nothing is patched."""
        if self._report is None:
            raise RuntimeError(f"{self._peer} is not patched: call rlhf_fast.integrations.{self._peer}.patch() first")
        return self._report

    def _version(self) -> str:
        oldest, newest = self._versions
        try:
            found = importlib.metadata.version(self._peer)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        else:
            if _minor(oldest) <= _minor(found) <= _minor(newest):
                return found
        raise ImportError(f"expected {self._peer} {oldest} to {newest}, which are tested; found {found}")

    def _replace(self, replacement: Replacement, report: Report) -> None:
        owner, name = _owner(replacement.target)
        if not hasattr(owner, name):
            report.left[replacement.target] = f"not in {report.peer}"
            return
        function = replacement.function
        ours: Any = _counted(function, report.calls)
        if replacement.method:
            ours = SimpleNamespace(**{replacement.method: ours})
        theirs = getattr(owner, name)
        setattr(owner, name, ours)
        places = [replacement.target]
        # None stands for a function that the peer lacks here
        if replacement.everywhere and theirs is not None:
            places += _rebind(theirs, ours)
        report.replaced[function.__name__] = sorted(places)

        def undo() -> None:
            setattr(owner, name, theirs)
            _rebind(ours, theirs)

        self._undo.append(undo)

    def _watch(self, report: Report) -> None:
        (owner, name), ours = _owner(self._step.target), self._step.function.__name__
        step = getattr(owner, name)

        @functools.wraps(step)
        def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            before = report.calls[ours]
            result = step(trainer, *args, **kwargs)
            if report.calls[ours] == before and self._step.expected(trainer):
                raise RuntimeError(
                    f"strict patch of {report.peer}: a training step of {type(trainer).__name__} did not call "
                    f"{ours}; patch before the trainer is made, or without strict. Replaced: {report.replaced}"
                )
            return result

        setattr(owner, name, watched)
        self._undo.append(lambda: setattr(owner, name, step))


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _owner(target: str) -> tuple[Any, str]:
    """The module or class that has the last name of a dotted path, and that name."""
    owner, _, name = target.rpartition(".")
    return pkgutil.resolve_name(owner), name


def _rebind(old: object, new: object) -> list[str]:
    """Binds every name of every imported module that holds ``old`` to ``new``; returns these names."""
    found = []
    for path, module in list(sys.modules.items()):
        if isinstance(module, ModuleType):
            names = [name for name, value in list(vars(module).items()) if value is old]
            for name in names:
                setattr(module, name, new)
                found.append(f"{path}.{name}")
    return found


def _counted(function: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    # In a compiled graph it runs once, while torch.compile traces; a counter in the graph would compile it every time.
    @torch.compiler.assume_constant_result
    def count() -> None:
        calls[function.__name__] += 1

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count()
        return function(*args, **kwargs)

    return counted
