"""Arguments of reward functions: TRL's keywords, two positional parameters, columns, copies."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Functions, RunView
from rlhf_fast.rewards.functions import call

CHAT = [{"role": "user", "content": "hi"}]


def seen(function: Callable[..., Any], columns: dict[str, Any] | None = None) -> Any:
    """What ``function`` returns for one completion is its reward."""
    return call("f", function, ["p"], ["c"], [{"answer": "a", **(columns or {})}], [[5, 1]])


def test_a_function_gets_by_keyword_what_it_names() -> None:
    def completions_first(completions: Any, answer: Any, **kwargs: Any) -> list[float]:
        return [
            float((completions, answer, kwargs["prompts"], kwargs["completion_ids"]) == (["c"], ["a"], ["p"], [[5, 1]]))
        ]

    def turned(completions: Any, prompts: Any) -> list[float]:
        return [float((prompts, completions) == (["p"], ["c"]))]

    def keyword_only(*, completion_ids: Any, answer: Any) -> list[float]:
        return [float((completion_ids, answer) == ([[5, 1]], ["a"]))]

    def everything(**kwargs: Any) -> list[float]:
        return [float(sorted(kwargs) == ["answer", "completion_ids", "completions", "prompts"])]

    def decorated(*args: Any, **kwargs: Any) -> list[float]:
        return [float(args == () and kwargs["completions"] == ["c"])]

    def default(completions: Any, answer: Any = None, threshold: float = 0.5, **kwargs: Any) -> list[float]:
        return [float(answer == ["a"] and threshold == 0.5)]

    for function in (completions_first, turned, keyword_only, everything, decorated, default):
        assert seen(function) == [1.0], function.__name__


def test_two_leading_parameters_of_any_name_are_prompts_and_completions() -> None:
    def right(prompts: Any, completions: Any, answer: Any = "a") -> list[float]:
        return [float((prompts, completions, answer in ("a", ["a"])) == (["p"], ["c"], True))]

    for function in (
        lambda p, c: right(p, c),
        lambda p, c, answer: right(p, c, answer),
        lambda p, c, **columns: (
            right(p, c, columns["answer"]) if sorted(columns) == ["answer", "completion_ids"] else [0]
        ),
        lambda p, completions: right(p, completions),
        lambda prompts, c: right(prompts, c),
        lambda p, c, /: right(p, c),
        lambda prompts, completions, /, answer: right(prompts, completions, answer),
        lambda *args: right(*args),
        lambda p, *rest: right(p, *rest),
        lambda *args, answer: right(*args, answer),
    ):
        assert seen(function) == [1.0]


def test_a_function_without_a_signature_gets_prompts_and_completions() -> None:
    with pytest.raises(UserError, match="reward function max must return finite numbers; got 'p'"):
        call("max", max, ["p"], ["c"], [{}])


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda completions, solution: [0], "solution"),
        (lambda prompts, completions, solution: [0], "solution"),
        (lambda prompts, solution, completions: [0], "solution"),
        (lambda completions, *, solution, **kwargs: [0], "solution"),
        (lambda texts: [0], "texts"),
        (lambda texts, **kwargs: [0], "texts"),
    ],
)
def test_a_parameter_that_nothing_fills_is_named_with_the_columns(function: Callable[..., Any], name: str) -> None:
    with pytest.raises(UserError, match=f"reward function f needs '{name}', .* there are answer, other .and prompts"):
        seen(function, {"other": 1})


@pytest.mark.parametrize("column", ["prompts", "completions", "completion_ids", "trainer_state", "log_metric"])
def test_a_column_named_like_an_argument_is_refused_where_the_function_would_get_it(column: str) -> None:
    with pytest.raises(UserError) as error:
        seen(lambda prompts, completions, **kwargs: [0.0], {column: 1})
    assert str(error.value).startswith(f"the data has a column '{column}', which is what reward functions call")
    assert f"--rename_columns {column}=data_{column}" in str(error.value)
    assert seen(lambda p, c: [0.0], {column: 1}) == [0.0]


def test_columns_are_checked_before_any_call(tmp_path: Any) -> None:
    (tmp_path / "f.py").write_text("def f(completions, answer): ...\ndef g(prompts, completions, **k): ...\n")
    both = Functions([f"{tmp_path}/f.py:f", f"{tmp_path}/f.py:g"])
    both.check(["answer", "other"])
    with pytest.raises(UserError, match="reward function f needs 'answer', .* there are none"):
        both.check([])
    with pytest.raises(UserError, match="the data has a column 'completions'"):
        both.check(["answer", "completions"])


def test_trl_extras_are_there_in_a_run(tmp_path: Any) -> None:
    (tmp_path / "f.py").write_text(
        "def f(completions, trainer_state, log_extra=None, log_metric=None, **kwargs):\n"
        "    log_extra('length', [len(c) for c in completions])\n"
        "    log_metric('longest', max(map(len, completions)))\n"
        "    log_metric('longest', 1)\n"
        "    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)\n"
        "def wrong(completions, log_extra, **kwargs):\n    log_extra('x', [1])\n"
    )
    view = RunView(2)
    view.state.global_step, view.state.max_steps = 3, 4
    arguments = (["p", "q"], ["ab", "c"], [{}, {}], [[1], [1]], view)
    assert Functions([f"{tmp_path}/f.py:f"]).each(*arguments) == {"f": [0.75, 0.75]}
    assert view.extras == {"length": [2, 1]} and view.metrics == {"longest": [2.0, 1.0]}
    assert call("f", lambda completions, trainer_state, **k: [trainer_state.global_step], ["p"], ["c"], [{}]) == [0.0]
    with pytest.raises(UserError, match="raised ValueError: log_extra.'x'. takes one value a completion: 2, got 1"):
        Functions([f"{tmp_path}/f.py:wrong"]).each(*arguments)


# ---- copies --------------------------------------------------------------------------------------------------------


def test_a_function_edits_its_own_copies(tmp_path: Any) -> None:
    (tmp_path / "f.py").write_text(
        "def greedy(prompts, completions, completion_ids, answer):\n"
        "    prompts[0].append(completions[0][0]); prompts[0][0]['content'] = 'edited'; prompts.pop()\n"
        "    completions[0][0]['content'] = 'edited'; completion_ids[0].clear(); answer[0].pop(); answer.clear()\n"
        "    return [0.0]\n"
        "def after(prompts, completions, completion_ids, answer):\n"
        "    assert prompts == [[{'role': 'user', 'content': 'hi'}]] and answer == [['1', '2']]\n"
        "    assert completions == [[{'role': 'assistant', 'content': 'there'}]] and completion_ids == [[7, 1]]\n"
        "    return [1.0]\n"
    )
    prompts, columns, ids = [[dict(CHAT[0])]], [{"answer": ["1", "2"]}], [[7, 1]]
    functions = Functions([f"{tmp_path}/f.py:greedy", f"{tmp_path}/f.py:after"])
    assert functions.each(prompts, ["there"], columns, ids) == {"greedy": [0.0], "after": [1.0]}
    assert (prompts, columns, ids) == ([CHAT], [{"answer": ["1", "2"]}], [[7, 1]])


def test_a_value_that_cannot_be_copied_is_passed_as_it_is() -> None:
    lock = threading.Lock()
    assert seen(lambda completions, lock: [float(lock[0].locked())], {"lock": lock}) == [0.0]
