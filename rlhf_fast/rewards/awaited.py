"""Async reward functions: all of a rollout together, on one event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from rlhf_fast.rewards.guard import this_process
from rlhf_fast.rewards.returned import plain


def await_together(waiting: Mapping[str, Any], count: int) -> dict[str, tuple[Any, Any]]:
    """Name -> what the awaitable or async generator gave, and ``plain`` of it or, in its place, the exception raised.

    After an exception the others are cancelled and left out.
    """
    running = asyncio.run_coroutine_threadsafe(_all(waiting, count), _event_loop())
    try:
        return running.result()
    except BaseException:  # a limit or Ctrl-C: the code may hold the loop for ever, and the next call gets a new one
        running.cancel()
        _event_loop.cache_clear()
        raise


async def _all(waiting: Mapping[str, Any], count: int) -> dict[str, tuple[Any, Any]]:
    tasks = [asyncio.ensure_future(_one(name, awaited, count)) for name, awaited in waiting.items()]
    outcomes = {}
    try:
        for finished in asyncio.as_completed(tasks):
            name, returned, values = await finished
            outcomes[name] = (returned, values)
            if isinstance(values, BaseException):
                break
    finally:
        for task in tasks:
            task.cancel()
    return outcomes


async def _one(name: str, awaited: Any, count: int) -> tuple[str, Any, Any]:
    try:
        with this_process():
            returned = awaited if isinstance(awaited, AsyncIterator) else await awaited
            if isinstance(returned, AsyncIterator):
                returned = await _first(returned, count + 1)
            return name, returned, plain(returned, count)
    except BaseException as error:  # SystemExit too: it would end the event loop
        return name, None, error


async def _first(items: AsyncIterator[Any], count: int) -> Any:
    found: list[Any] = []
    async for item in items:
        found.append(item)
        if len(found) == count:
            break
    return iter(found)  # as of any generator, nothing tells how many more there are


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One for the whole process, in a thread: a client that a file keeps stays bound to the loop that it began on, and
    a notebook's main thread runs a loop of its own."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        while True:
            with suppress(SystemExit, KeyboardInterrupt):  # of a task that the code started; what awaits it gets it too
                loop.run_forever()

    threading.Thread(target=run, name="async reward functions", daemon=True).start()
    return loop
