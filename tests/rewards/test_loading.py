"""Where reward functions may live: classes, objects, methods, packages, files beside others."""

import functools
import importlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.functions import Functions, call, load_function

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "rewards.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture(autouse=True)
def modules_as_before() -> Iterator[None]:
    path, modules = list(sys.path), dict(sys.modules)
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - modules.keys():
        del sys.modules[name]


def rewards(name: str) -> list[float | None]:
    return call("f", load_function(name), ["p"], ["abc"], [{}])


CALLABLES = """
import functools
class Length:
    __name__ = "length"
    def __init__(self, factor=1): self.factor = factor
    def __call__(self, completions, **kwargs): return [self.factor * len(c) for c in completions]
    def method(self, completions, **kwargs): return [len(c) + 10 for c in completions]
    @staticmethod
    def static(completions, **kwargs): return [len(c) + 20 for c in completions]
    @classmethod
    def of_class(cls, completions, **kwargs): return [len(c) + 30 for c in completions]
class Later(Length):
    async def __call__(self, completions, **kwargs): return [len(c) + 40 for c in completions]
double = Length(2)
class Box:
    inner = Length(5)
partial = functools.partial(lambda completions, factor: [factor * len(c) for c in completions], factor=7)
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Length", 3), ("double", 6), ("Length.method", 13), ("Length.static", 23), ("Length.of_class", 33)]
    + [("Later", 43), ("double.method", 13), ("Box.inner", 15), ("partial", 21)],
)
def test_classes_objects_methods_and_partials(write: Write, name: str, expected: float) -> None:
    assert rewards(f"{write(CALLABLES)}:{name}") == [expected]


def test_a_class_that_needs_arguments_is_told(write: Write) -> None:
    path = write("class Judge:\n    def __init__(self, model): ...\n    def __call__(self, completions): ...\n")
    with pytest.raises(UserError, match="reward function .*:Judge raised TypeError: .*'model'"):
        load_function(f"{path}:Judge")


def test_missing_parts_of_a_dotted_name_are_told(write: Write) -> None:
    path = write(CALLABLES)
    for name in ("Length.nothing", "nothing.method", "Box"):
        with pytest.raises(UserError) as error:
            rewards(f"{path}:{name}")
        assert name in str(error.value)


def test_a_file_imports_what_lies_beside_it_also_later(write: Write) -> None:
    write("SIZE = 4\n", "helper_beside.py")
    write("SIZE = 5\n", "late_beside.py")
    path = write(
        "import helper_beside\n"
        "def f(completions, **kwargs):\n    import late_beside\n    return [helper_beside.SIZE + late_beside.SIZE]\n"
    )
    assert rewards(f"{path}:f") == [9]


@pytest.mark.parametrize("name", ["my-rewards.py", "rewards.v2.py", "__main__.py", "statistics.py", "torch.py", "1.py"])
def test_a_file_may_have_any_name_and_takes_no_module_of_that_name_away(write: Write, name: str) -> None:
    path = write("import statistics, torch\ndef f(completions, **kwargs):\n    return [statistics.fmean([7])]\n", name)
    assert rewards(f"{path}:f") == [7]
    assert Path(importlib.import_module("statistics").__file__ or "") != path and sys.modules["torch"] is torch


def test_a_file_of_a_package_imports_relatively(write: Write) -> None:
    write("", "judges/__init__.py")
    write("SIZE = 6\n", "judges/sizes.py")
    path = write("from .sizes import SIZE\ndef f(completions, **kwargs):\n    return [SIZE]\n", "judges/rules.py")
    assert rewards(f"{path}:f") == [6]


def test_a_module_in_the_current_folder_and_a_home_path(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("def f(completions, **kwargs):\n    return [8]\n", "my_own_rewards.py")
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))
    assert rewards("my_own_rewards:f") == [8]
    assert rewards("~/my_own_rewards.py:f") == [8]


def test_a_file_runs_once_for_its_functions_and_again_when_it_has_changed(write: Write) -> None:
    text = (
        "calls = []\ndef a(completions, **k):\n    calls.append(1)\n    return [len(calls)]\ndef b(completions, **k):\n"
    )
    path = write(text + "    return [len(calls)]\n")
    functions = Functions([f"{path}:a", f"{path}:b"])
    assert functions.each(["p"], ["x"], [{}]) == {"a": [1.0], "b": [1.0]}
    write(text + "    return [len(calls) + 100]\n")
    assert rewards(f"{path}:b") == [100]


def test_what_a_file_defines_can_be_pickled(write: Write) -> None:
    path = write("import pickle\nclass A: ...\ndef f(completions, **k):\n    return [len(pickle.dumps(A()))]\n")
    assert rewards(f"{path}:f")[0]
    assert pickle.loads(pickle.dumps(load_function(f"{path}:f"))) is load_function(f"{path}:f")


def test_a_file_that_prints_and_changes_settings_at_import(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        "import os, torch\nprint('loading the judge')\ntorch.set_grad_enabled(False)\n"
        "torch.set_default_dtype(torch.float64)\nos.chdir('/')\ndef f(completions, **k): return [0]\n"
    )
    folder = os.getcwd()
    load_function(f"{path}:f")
    assert capsys.readouterr() == ("", "loading the judge\n")
    assert torch.is_grad_enabled() and torch.get_default_dtype() is torch.float32 and os.getcwd() == folder


def test_a_torch_module_is_called_by_what_its_forward_names() -> None:
    class Judge(torch.nn.Module):
        def forward(self, prompts: Any, completions: Any) -> torch.Tensor:
            return torch.tensor([float(len(c)) for c in completions])

    assert call("judge", Judge(), ["p"], ["abc"], [{"answer": 1}], [[1]]) == [3.0]


def test_decorated_functions_are_called_by_what_they_name() -> None:
    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return inner

    def careless(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(*args, **kwargs)

    def f(completions: Any, answer: Any, **kwargs: Any) -> list[float]:
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    for decorated in (timed(f), careless(f)):
        assert call("f", decorated, ["q"], ["42"], [{"answer": "42"}]) == [1.0]
