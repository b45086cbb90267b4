"""Python functions as rewards: finding them, their arguments, and one line for each error."""

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Functions
from rlhf_fast.rewards.functions import call, load_function

CHAT = [{"role": "user", "content": "hi"}]


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "rewards.py"
        path.write_text(text)
        return path

    return write


# ---- finding them --------------------------------------------------------------------------------------------------


def test_a_function_is_found_in_a_file_and_in_a_module(file: Callable[[str], Path]) -> None:
    path = file("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    assert load_function(f"{path}:length")(["p"], ["abc"]) == [3]
    assert load_function("math:sqrt") is math.sqrt


def test_a_file_may_be_named_like_a_module_and_hold_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "json.py"
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses, json\n"
        "@dataclasses.dataclass\n"
        "class Rule:\n    weight: float\n"
        "def f(prompts, completions):\n    return [Rule(2.0).weight + len(json.dumps(c)) for c in completions]\n"
    )
    assert load_function(f"{path}:f")(["p"], ["ab"]) == [6.0]
    import json

    assert json.__file__ != str(path)


@pytest.mark.parametrize("name", ["length", "rewards.py", ":length", "rewards.py:", ""])
def test_a_name_without_both_parts_is_refused(name: str) -> None:
    assert f"FILE.py:NAME or MODULE:NAME; got {name!r}" in refusal(lambda: load_function(name))


def test_what_cannot_be_found_is_named(file: Callable[[str], Path], tmp_path: Path) -> None:
    path = file("def length(prompts, completions): ...\nWEIGHT = 2\n")
    assert f"no file {tmp_path / 'none.py'}" in refusal(lambda: load_function(f"{tmp_path / 'none.py'}:f"))
    message = refusal(lambda: load_function(f"{path}:lenght"))
    assert "no function 'lenght'" in message and "(did you mean 'length'?)" in message
    assert "no function 'WEIGHT'" in refusal(lambda: load_function(f"{path}:WEIGHT"))
    assert "ModuleNotFoundError" in refusal(lambda: load_function("no_such_module_anywhere:f"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(:\n", "SyntaxError"),
        ("\nimport nothing_like_this\n", "line 2"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines"),
        ("import sys\nsys.exit(3)\n", "SystemExit"),
    ],
)
def test_a_file_that_fails_when_it_runs_is_named(file: Callable[[str], Path], text: str, expected: str) -> None:
    path = file(text)
    message = refusal(lambda: load_function(f"{path}:f"))
    assert expected in message and str(path) in message and "cannot be imported" in message


def test_two_functions_of_one_name_are_refused(file: Callable[[str], Path]) -> None:
    path = file("def sqrt(prompts, completions): ...\n")
    assert "two reward functions are called 'sqrt'" in refusal(lambda: Functions(["math:sqrt", f"{path}:sqrt"]))


# ---- calling them --------------------------------------------------------------------------------------------------


def test_each_and_total(file: Callable[[str], Path]) -> None:
    path = file(
        "def length(prompts, completions):\n    return [len(c) for c in completions]\n"
        "def match(prompts, completions, answer):\n    return [float(a == c) for a, c in zip(answer, completions)]\n"
    )
    functions = Functions([f"{path}:length", f"{path}:match"])
    arguments = (["p", "q"], ["ab", "c"], [{"answer": "x"}, {"answer": "c"}])
    assert functions.names == ["length", "match"]
    assert functions.each(*arguments) == {"length": [2.0, 1.0], "match": [0.0, 1.0]}
    assert functions.total(*arguments) == [2.0, 2.0]
    assert Functions([]).total(*arguments) == [0.0, 0.0] and Functions([]).each(*arguments) == {}
    assert functions.total([], [], []) == []


def test_a_function_gets_the_columns_that_it_names_or_all() -> None:
    seen: list[dict[str, Any]] = []

    def named(prompts: Any, completions: Any, b: Any, missing: Any = "default") -> list[float]:
        seen.append({"b": b, "missing": missing})
        return [0.0] * len(completions)

    def everything(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.append(columns)
        return [0.0] * len(completions)

    columns = [{"a": 1, "b": 2}, {"b": 3, "c": 4}]
    for function in (named, everything):
        assert call("f", function, ["p", "q"], ["x", "y"], columns) == [0.0, 0.0]
    assert seen == [{"b": [2, 3], "missing": "default"}, {"a": [1, None], "b": [2, 3], "c": [None, 4]}]


def test_a_chat_prompts_completion_is_a_chat_too_and_text_stays_text() -> None:
    seen: list[Any] = []

    def look(prompts: Any, completions: Any) -> list[float]:
        seen.extend([prompts, completions])
        return [0.0, 0.0]

    call("f", look, [CHAT, "text"], ["yes", "no"], [{}, {}])
    assert seen == [[CHAT, "text"], [[{"role": "assistant", "content": "yes"}], "no"]]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2],
        (1.0, 2.0),
        [Fraction(1), Decimal(2)],
        {"a": 1, "b": 2}.values(),
        [torch.tensor(1.0), torch.tensor(2)],
        [torch.tensor([1.0]), numpy.array([2.0])],
        torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16, requires_grad=True),
        numpy.array([[1], [2]]),
        iter([1, 2]),
        numpy.array([1.0, 2.0], dtype="float32"),
        [numpy.float32(1), numpy.int64(2)],
        torch.tensor([1.0, 2.0]),
        [True, 2],
        (x for x in (1, 2)),
    ],
)
def test_any_two_numbers_are_rewards(returned: Any) -> None:
    rewards = call("f", lambda prompts, completions: returned, ["p", "q"], ["x", "y"], [{}, {}])
    assert rewards == [1.0, 2.0] and all(type(reward) is float for reward in rewards)


# ---- what they may not do ------------------------------------------------------------------------------------------


def returning(value: Any) -> str:
    completions = ["x", "the bad one"]
    return refusal(lambda: call("f", lambda prompts, completions: value, ["p", "q"], completions, [{}, {}]))


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, "2", b"2", 2j, numpy.complex64(2), [2.0], 10**400]
    + [numpy.zeros(3), torch.zeros(3), numpy.nan, torch.tensor(math.nan), numpy.datetime64("2024-01-01")],
)
def test_a_reward_that_is_no_finite_number_is_named_with_its_completion(value: Any) -> None:
    message = returning([1.0, value])
    assert "reward function f must return finite numbers" in message
    assert "for completion 1: 'the bad one'" in message


def test_none_abstains() -> None:
    def f(prompts: Any, completions: Any) -> list[Any]:
        return [None, 1]

    assert call("f", f, ["p", "q"], ["x", "y"], [{}, {}]) == [None, 1.0]
    assert call("f", lambda prompts, completions: [None, None], ["p", "q"], ["x", "y"], [{}, {}]) == [None, None]
    assert "None abstains" in returning([1.0, math.nan])


@pytest.mark.parametrize("value", [1e300, -1e13, numpy.float64(1e200), 10**15])
def test_a_reward_too_large_to_be_trained_on_is_blamed_on_the_function(value: Any) -> None:
    message = returning([0, value])
    assert "reward function f must return numbers from -1e+12 to 1e+12; got" in message and "completion 1" in message


@pytest.mark.parametrize(
    "value",
    [{0: 1.0, 1: 1.0}, {1.0, 2.0}, frozenset([1.0, 2.0]), {1: 0, 2: 0}.keys(), "12", b"12", torch.tensor(1.0), 2.0]
    + [numpy.float32(1), torch.zeros(2, 2), numpy.zeros((2, 3)), torch.zeros(1, 2), object(), Ellipsis],
)
def test_what_is_no_list_in_the_completions_order_is_refused(value: Any) -> None:
    assert "must return a list, one number a completion: 2, got" in returning(value)


def test_an_object_whose_repr_fails_is_refused_in_a_line() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise ValueError

    assert "got an object of type Rude" in returning(Rude()) and "got an object of type Rude" in returning([1, Rude()])
    assert "got an object of type int for completion 1" in returning([1, 10**5000])


def test_generators_are_read_as_far_as_there_are_completions() -> None:
    def endless(prompts: Any, completions: Any) -> Any:
        while True:
            yield 1.0

    def late(prompts: Any, completions: Any) -> Any:
        yield 1.0
        raise KeyError("late")

    arguments = (["p", "q"], ["x", "y"], [{}, {}])
    assert "one number a completion: 2, got more than 2" in refusal(lambda: call("endless", endless, *arguments))
    assert "reward function late raised KeyError: 'late' (" in refusal(lambda: call("late", late, *arguments))


def test_another_number_of_rewards_is_refused() -> None:
    assert "must return one number a completion: 2, got 5" in returning(torch.zeros(5))
    assert "must return one number a completion: 2, got 1" in returning(x for x in [1.0])
    assert "must return one number a completion: 2, got 3" in returning([1, 2, 3])
    assert "must return one number a completion: 2, got 0" in returning([])
    assert "must return a list, one number a completion: 2, got None" in returning(None)
    assert "must return a list, one number a completion: 2, got 1.5" in returning(1.5)


def test_what_a_function_raises_is_told_with_its_name_and_place(file: Callable[[str], Path]) -> None:
    path = file("def f(prompts, completions):\n    x = 1\n    return [{}['reward']]\n")
    functions = Functions([f"{path}:f"])
    message = refusal(lambda: functions.total(["p"], ["x"], [{}]))
    assert "reward function f raised KeyError: 'reward'" in message and f"{path}, line 3" in message


def test_the_place_named_is_the_persons_own_line_not_a_librarys(file: Callable[[str], Path]) -> None:
    path = file("import json\ndef f(prompts, completions):\n    return [json.loads('{')]\n")
    assert f"({path}, line 3)" in refusal(lambda: call("f", load_function(f"{path}:f"), ["p"], ["x"], [{}]))


def test_a_column_that_is_asked_for_and_not_there_is_told() -> None:
    def wants(prompts: Any, completions: Any, answer: Any) -> list[float]:
        return [0.0]

    message = refusal(lambda: call("wants", wants, ["p"], ["x"], [{"other": 1, "more": 2}]))
    assert "reward function wants needs 'answer', which is no column of the data; there are more, other (and" in message
    assert "--rename_columns OLD=answer" in message
