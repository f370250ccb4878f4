"""The session's private event loop: one thread for all of the controller's gRPC; user code stays synchronous."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar

from torchways.errors import DeadlineExceeded

T = TypeVar("T")


class LoopThread:
    """An asyncio loop on a daemon thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: timedelta | None = None, what: str = "") -> T:
        """Runs a coroutine on the loop and waits for it; Ctrl-C ends the wait.

        Raises:
            DeadlineExceeded: `timeout` passed; the message names `what`.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(None if timeout is None else timeout.total_seconds())
        except concurrent.futures.TimeoutError as error:
            if future.done() and not future.cancelled():
                raise  # the coroutine itself raised it
            raise DeadlineExceeded(f"waited {timeout} for {what or 'an answer'} in vain") from error
        finally:
            future.cancel()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs a coroutine on the loop without waiting."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Calls a function on the loop soon; order is kept."""
        self.loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """Stops the loop and waits for its thread. Idempotent."""
        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self.loop.close()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
