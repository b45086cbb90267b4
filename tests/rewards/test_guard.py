"""User code in our process: exits, interruptions, limits, output and side effects."""

import asyncio
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import RunView
from rlhf_fast.rewards.functions import Functions, call
from rlhf_fast.signals import Interruptible


def run(function: Callable[..., Any], timeout: float | None = None) -> Any:
    return call("f", function, ["p"], ["c"], [{}], timeout=timeout)


def refusal(function: Callable[..., Any], timeout: float | None = None) -> str:
    with pytest.raises(UserError) as error:
        run(function, timeout)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- ends ----------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., Any]:
    def f(prompts: Any, completions: Any) -> Any:
        raise error

    return f


def awaited(function: Callable[..., Any]) -> Callable[..., Any]:
    async def f(prompts: Any, completions: Any) -> Any:
        return function(prompts, completions)

    return f


ERRORS = [
    SystemExit(0),
    SystemExit("bye"),
    KeyboardInterrupt(),
    GeneratorExit(),
    asyncio.CancelledError(),
    UserError("x"),
]


@pytest.mark.parametrize("wrapped", [lambda f: f, awaited], ids=["sync", "async"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_function_raises_is_told_with_its_name_and_place(
    error: BaseException, wrapped: Callable[..., Any]
) -> None:
    message = refusal(wrapped(raising(error)))
    assert f"reward function f raised {type(error).__name__}" in message and f"({__file__}, line " in message


def test_an_exception_without_a_text_is_told_by_its_name() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert "reward function f raised Mute (" in refusal(raising(Mute()))


def test_exit_and_a_late_exit_of_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # exit() closes it

    def late(prompts: Any, completions: Any) -> Any:
        yield 1.0
        raise SystemExit(0)

    assert "raised SystemExit" in refusal(lambda p, c: exit())
    assert "raised SystemExit: 0" in refusal(late)


@pytest.mark.parametrize("caught", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_by_a_person_stays_one_also_where_the_function_catches_it(number: int, caught: bool) -> None:
    def f(prompts: Any, completions: Any) -> list[float]:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except BaseException:
            if not caught:
                raise SystemExit(0) from None
        return [1.0]

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(f)
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)


def forking(in_child: Callable[[], Any]) -> Callable[..., Any]:
    """Scores are the child's exit status."""

    def f(prompts: Any, completions: Any) -> list[float]:
        child = os.fork()
        if child == 0:
            in_child()
            return [0.0]
        return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))]

    return f


@pytest.mark.parametrize("wrapped", [lambda f: f, awaited], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("in_child", "status"),
    [
        (lambda: sys.exit(0), 0),
        (lambda: sys.exit(7), 7),
        (lambda: sys.exit("bye"), 1),
        (lambda: 1 / 0, 1),
        (lambda: None, 0),
        (lambda: os._exit(5), 5),
    ],
)
def test_a_process_that_a_function_forks_ends_as_a_script_would(
    in_child: Callable[[], Any], status: int, wrapped: Callable[..., Any]
) -> None:
    parent = os.getpid()
    try:
        scores = run(wrapped(forking(in_child)))
    finally:
        if os.getpid() != parent:  # the child has become the run
            os._exit(99)
    assert scores == [float(status)]


@pytest.mark.parametrize("wrapped", [lambda f: f, awaited], ids=["sync", "async"])
def test_a_hard_exit_is_told_and_ends_no_run(wrapped: Callable[..., Any]) -> None:
    leave = os._exit
    assert "called os._exit(0)" in refusal(wrapped(lambda p, c: os._exit(0)))
    assert os._exit is leave


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_forked_process_has_the_handlers_of_before(number: int) -> None:
    def f(prompts: Any, completions: Any) -> list[float]:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        os.kill(child.pid, number)
        child.join(10)
        return [float(child.exitcode)]

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with Interruptible():
            assert run(f, timeout=60) == [-float(number)]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_pool_of_processes_ends_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    def f(prompts: Any, completions: Any) -> list[float]:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(float, [3])

    with Interruptible():
        assert [run(f, timeout=60) for _ in range(5)] == [[3.0]] * 5
    assert capfd.readouterr().err == ""


# ---- limits --------------------------------------------------------------------------------------------------------


def loops(prompts: Any, completions: Any) -> Any:
    while True:
        pass


def endless_generator(prompts: Any, completions: Any) -> Any:
    loops(prompts, completions)
    yield 1.0


def backtracks(prompts: Any, completions: Any) -> Any:
    re.match("(a+)+$", "a" * 40 + "b")


def locks(prompts: Any, completions: Any) -> Any:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def receives(prompts: Any, completions: Any) -> Any:
    ends = socket.socketpair()
    ends[0].recv(1)


def catches(prompts: Any, completions: Any) -> Any:
    while True:
        try:
            time.sleep(1e6)
        except Exception:
            pass


def catches_all_once(prompts: Any, completions: Any) -> Any:
    try:
        time.sleep(1e6)
    except:  # noqa: E722
        time.sleep(1e6)


async def waits(prompts: Any, completions: Any) -> Any:
    await asyncio.sleep(1e6)


HANGS: list[Callable[..., Any]] = [
    loops,
    endless_generator,
    backtracks,
    locks,
    receives,
    catches,
    catches_all_once,
    waits,
]
HANGS += [
    lambda p, c: time.sleep(1e6),
    lambda p, c: subprocess.run(["sleep", "1000"]),
    awaited(lambda p, c: time.sleep(9)),
]


@pytest.mark.parametrize("function", HANGS, ids=lambda function: function.__name__)
def test_a_hang_ends_at_the_limit(function: Callable[..., Any]) -> None:
    began = time.monotonic()
    message = refusal(function, timeout=0.3)
    assert re.match(r"reward function f( \(async\))? was still running after 0.3 seconds", message)
    assert "--reward_timeout" in message and time.monotonic() - began < 5
    if not asyncio.iscoroutinefunction(function):
        assert f"({__file__}, line " in message
    assert run(awaited(lambda p, c: [1.0]), timeout=5) == [1.0]  # and the next call is not blocked
    assert signal.getsignal(signal.SIGPROF) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_a_function_keeps_its_own_alarm_and_the_main_thread() -> None:
    def verifier(prompts: Any, completions: Any) -> list[float]:
        def late(number: int, frame: Any) -> None:
            raise TimeoutError

        old = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(2)
        except TimeoutError:
            return [0.5]
        finally:
            signal.signal(signal.SIGALRM, old)
        return [1.0]

    assert run(verifier, timeout=5) == [0.5]


def test_a_cpu_timer_that_runs_ahead_of_the_clock_does_not_cut_a_function_short() -> None:
    def many_threads(prompts: Any, completions: Any) -> list[float]:
        signal.raise_signal(signal.SIGPROF)  # as after CPU time of several threads
        assert 0 < signal.getitimer(signal.ITIMER_PROF)[0] <= 5.1
        return [1.0]

    assert run(many_threads, timeout=5) == [1.0]


def test_outside_the_main_thread_a_function_runs_without_a_limit() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run(lambda p, c: [time.sleep(0.2) or 1.0], timeout=0.05)))
    thread.start()
    thread.join()
    assert found == [[1.0]]


# ---- what it leaves changed ----------------------------------------------------------------------------------------


def test_random_states_and_settings_are_put_back() -> None:
    def judge(prompts: Any, completions: Any) -> list[float]:
        torch.manual_seed(0)
        numpy.random.seed(0)
        random.seed(0)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_float32_matmul_precision("medium")
        os.chdir("/")
        return [0.0]

    def fails(prompts: Any, completions: Any) -> Any:
        judge(prompts, completions)
        raise ValueError

    def settings() -> list[Any]:
        found = [torch.is_grad_enabled(), torch.get_default_dtype(), torch.empty(0).device, torch.get_num_threads()]
        return [*found, torch.get_float32_matmul_precision(), os.getcwd()]

    for function in (judge, awaited(judge), fails):
        torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
        expected = torch.rand(1).item(), numpy.random.rand(), random.random()
        before = settings()
        torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
        refusal(function) if function is fails else run(function)
        assert (torch.rand(1).item(), numpy.random.rand(), random.random()) == expected
        assert settings() == before


# ---- what it prints ------------------------------------------------------------------------------------------------


def test_prints_come_out_as_whole_lines(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.py").write_text(
        "import sys, threading\n"
        "def f(prompts, completions, **k):\n"
        "    print('one', end=''); print(' line\\nand', 2, flush=True); sys.stdout.writelines(['a\\n', 'b'])\n"
        "    thread = threading.Thread(target=print, args=('\\nof a thread',)); thread.start(); thread.join()\n"
        "    assert not sys.stdout.isatty() and sys.stdout.encoding\n"
        "    print('the rest', end='')\n"
        "    return [0.0]\n"
        "async def later(completions, **k):\n    print('async'); return [0.0]\n"
        "def fails(completions, **k):\n    print('before', end=''); raise ValueError\n"
    )
    said: list[str] = []
    view = RunView(1, say=said.append)
    Functions([f"{tmp_path}/f.py:f", f"{tmp_path}/f.py:later"]).each(["p"], ["c"], [{}], [[1]], view)
    assert said == ["one line", "and 2", "a", "b", "of a thread", "the rest", "async"]
    with pytest.raises(UserError):
        Functions([f"{tmp_path}/f.py:fails"]).each(["p"], ["c"], [{}], [[1]], view)
    assert said[-1] == "before" and capsys.readouterr() == ("", "")


# ---- async ---------------------------------------------------------------------------------------------------------


def test_async_functions_run_together_on_one_lasting_loop(tmp_path: Any) -> None:
    (tmp_path / "f.py").write_text(
        "import asyncio\n"
        "lock, here, both, loops = asyncio.Lock(), 0, asyncio.Event(), set()\n"
        "async def a(completions, **k):\n"
        "    global here\n    here += 1\n    loops.add(asyncio.get_running_loop())\n"
        "    if here == 2: both.set()\n"
        "    async with lock: await asyncio.sleep(0)\n"
        "    await asyncio.wait_for(both.wait(), 5)\n    return [float(len(loops))]\n"
        "async def b(completions, **k):\n    return await a(completions)\n"
        "def returns_a_coroutine(completions, **k):\n    return b(completions)\n"
        "async def generates(completions, **k):\n    for c in completions: yield 1.0\n"
        "async def endless(completions, **k):\n    while True: yield 1.0\n"
    )
    functions = Functions([f"{tmp_path}/f.py:{name}" for name in ("a", "b", "generates")])
    expected = {"a": [1.0], "b": [1.0], "generates": [1.0]}
    for _ in range(2):
        assert functions.each(["p"], ["c"], [{}]) == expected
    assert Functions([f"{tmp_path}/f.py:returns_a_coroutine"]).each(["p"], ["c"], [{}]) == {
        "returns_a_coroutine": [1.0]
    }
    with pytest.raises(
        UserError, match="reward function endless must return one number a completion: 1, got more than"
    ):
        Functions([f"{tmp_path}/f.py:endless"]).each(["p"], ["c"], [{}])


def test_an_exit_in_a_task_that_an_async_function_began_does_not_end_the_loop() -> None:
    async def leaves() -> None:
        raise SystemExit(0)

    async def f(prompts: Any, completions: Any) -> Any:
        await asyncio.create_task(leaves())

    assert "reward function f raised SystemExit: 0" in refusal(f, timeout=5)
    assert run(awaited(lambda p, c: [1.0]), timeout=5) == [1.0]


def test_an_async_function_is_called_where_a_loop_runs_already() -> None:
    async def notebook() -> Any:
        return run(awaited(lambda p, c: [1.0]))

    assert asyncio.run(notebook()) == [1.0]


def test_one_async_function_that_fails_does_not_wait_for_the_others(tmp_path: Any) -> None:
    (tmp_path / "f.py").write_text(
        "import asyncio\nasync def slow(completions, **k):\n    await asyncio.sleep(60)\n"
        "async def wrong(completions, **k):\n    return [1 / 0]\n"
    )
    began = time.monotonic()
    with pytest.raises(UserError, match="reward function wrong raised ZeroDivisionError.*f.py, line 5"):
        Functions([f"{tmp_path}/f.py:slow", f"{tmp_path}/f.py:wrong"]).each(["p"], ["c"], [{}])
    assert time.monotonic() - began < 10


@pytest.mark.filterwarnings("error")
def test_a_coroutine_is_not_left_unawaited_where_another_function_fails(tmp_path: Any) -> None:
    (tmp_path / "f.py").write_text(
        "async def a(completions, **k): return [1]\ndef b(completions, **k): return [1 / 0]\n"
    )
    with pytest.raises(UserError, match="reward function b raised"):
        Functions([f"{tmp_path}/f.py:a", f"{tmp_path}/f.py:b"]).each(["p"], ["c"], [{}])
