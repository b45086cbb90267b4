"""From FILE.py:NAME or MODULE:NAME to the function behind it."""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_fast.errors import UserError, nearest
from rlhf_fast.rewards.guard import guarded

RewardFunction = Callable[..., Any]


def load_function(name: str) -> RewardFunction:
    """The callable behind ``FILE.py:NAME`` or ``MODULE:NAME``; NAME may be dotted: ``Class.method``.

    A class with ``__call__`` is made an object, without arguments. A file can import what lies beside it. Raises
    UserError for what is missing, and for whatever the file raises when it runs.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise UserError(f"a reward function is named FILE.py:NAME or MODULE:NAME; got {name!r}")
    path = Path(place).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise UserError(f"reward function {name}: no file {place}")
    with guarded(f"reward function {name}: {place}", failed="cannot be imported:"):
        module = _from_file(path) if path.suffix == ".py" else _from_path(place)
    with guarded(f"reward function {name}"):
        function, missing = _find(module, attribute)
    if missing or not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"reward function {name}: no function {attribute!r} in {place}{nearest(attribute, known)}")
    return function


def _from_file(path: Path) -> ModuleType:
    state = path.stat()
    return _run_file(path.resolve(), (state.st_mtime_ns, state.st_size))


@functools.cache
def _run_file(path: Path, version: tuple[int, int]) -> ModuleType:
    """The module of a file: one, whatever the number of its functions; another ``version`` of the file runs again."""
    name, folder = path.stem, path.parent
    while (folder / "__init__.py").is_file():  # a file of a package: its relative imports work
        name, folder = f"{folder.name}.{name}", folder.parent
    _make_findable(folder)
    if _origin(name) != path:  # the name is another module's, such as json, or no name for a module
        name = f"reward_functions_{path.stem.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _origin(name: str) -> Path | None:
    """The file that ``import name`` would run."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if found is None or found.origin is None else Path(found.origin).resolve()


def _from_path(name: str) -> ModuleType:
    _make_findable(Path.cwd())
    return importlib.import_module(name)


def _make_findable(folder: Path) -> None:
    """Behind everything installed, so that a file of ours named like a library hides none."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _find(module: ModuleType, dotted: str) -> tuple[Any, bool]:
    """What ``dotted`` names, and whether it is missing. Methods are bound, classes with __call__ made objects."""
    found: Any = module
    for part in dotted.split("."):
        if inspect.isclass(found) and inspect.isfunction(inspect.getattr_static(found, part, None)):
            found = found()
        if not hasattr(found, part):
            return None, True
        found = getattr(found, part)
    if inspect.isclass(found) and any("__call__" in vars(base) for base in found.__mro__):
        found = found()
    return found, False
