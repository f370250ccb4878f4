"""The session's private event loop: one thread for all of the controller's gRPC; user code stays synchronous.

All sessions of a process have their turn on one loop: grpc.aio's poller holds on to every loop that it has served, and
fails when it has news for one that is closed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar

from torchways.errors import DeadlineExceeded
from torchways.signals import result_of, uninterrupted

T = TypeVar("T")

_lock = threading.Lock()
#: The loop, and the process in which its thread runs: one that was forked has none.
_shared: tuple[asyncio.AbstractEventLoop, int] | None = None


def wait_for(
    future: concurrent.futures.Future[T], timeout: timedelta | None = None, what: str = "", *, gives_up: bool = True
) -> T:
    """Waits for a future's result; Ctrl-C ends the wait.

    In the end nothing is done for the future any more, unless `gives_up` is False.

    Raises:
        DeadlineExceeded: `timeout` passed; the message names `what`.
    """
    try:
        return result_of(future, None if timeout is None else timeout.total_seconds())
    except concurrent.futures.TimeoutError as error:
        if future.done() and not future.cancelled():
            raise  # what it waits for raised it
        raise DeadlineExceeded(f"waited {timeout} for {what or 'an answer'} in vain") from error
    finally:
        if gives_up:
            with uninterrupted():
                future.cancel()


class LoopThread:
    """A turn on the process's asyncio loop, which runs on a daemon thread of its own; one at a time.

    Attributes:
        loop: the loop.
        closed: the turn is over: nothing can be started any more.
    """

    def __init__(self, name: str) -> None:
        self.loop = _running_loop(name)
        self.closed = False

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: timedelta | None = None, what: str = "") -> T:
        """Runs a coroutine on the loop and waits for it; Ctrl-C ends the wait.

        Raises:
            DeadlineExceeded: `timeout` passed; the message names `what`.
        """
        return wait_for(self.start(coroutine), timeout, what)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs a coroutine on the loop without waiting.

        Raises:
            RuntimeError: it was closed.
        """
        if self.closed:
            coroutine.close()
        self._check()
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Calls a function on the loop soon; order is kept.

        Raises:
            RuntimeError: it was closed.
        """
        self._check()
        self.loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """Ends all that was started, and waits for it. Idempotent."""
        with uninterrupted():
            if self.closed:
                return
            self.closed = True
            ending = asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop)
        result_of(ending, 5)

    def _check(self) -> None:
        if self.closed:
            raise RuntimeError("the session's event loop is closed")


def _running_loop(name: str) -> asyncio.AbstractEventLoop:
    global _shared
    with _lock:
        if _shared is None or _shared[1] != os.getpid():
            loop = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(loop,), name=name, daemon=True).start()
            _shared = loop, os.getpid()
        return _shared[0]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
