"""Python's signal handlers, whose exceptions (Ctrl-C) may arrive between any two steps of the main thread.

`uninterrupted` makes several steps one to them. And whoever waits does so without a lock written in Python: an
exception that arrives just after such a lock is taken leaves it held for ever, and other threads waiting for it.
"""

from __future__ import annotations

# Python's `signal` looks each handler up in an enum, which takes ten times as long: a good part of a call.
import _signal  # type: ignore[import-not-found]
import concurrent.futures
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

#: Signals whose handlers often raise: Ctrl-C, `kill`, time limits.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


class Interrupted(BaseException):
    """A signal came that ends what is under way; `number` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def raise_interrupted(number: int, _: object) -> None:
    """Raises `Interrupted`; a handler for `signal.signal`."""
    raise Interrupted(number)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Runs what is inside as one step to signals: a handler runs when it is over. Keep it short: nothing may wait.

    Python runs handlers on the main thread only, so other threads are not interrupted anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    try:
        for signal_number in _SIGNALS:
            handler = _signal.getsignal(signal_number)
            if callable(handler):
                handlers[signal_number] = handler
                _signal.signal(signal_number, lambda *arrived: came.append(arrived))
        yield
    finally:
        _restore(handlers)
        for arrived, frame in came:
            handlers[arrived](arrived, frame)


def _restore(handlers: dict[int, Callable[[int, FrameType | None], Any]]) -> None:
    """Sets all handlers again. Python runs those whose signals have come as it sets one: they may raise in between."""
    left = list(handlers.items())
    try:
        while left:
            _signal.signal(*left[-1])  # an exception comes before it is set: it is still among those that are left
            left.pop()
    except BaseException:
        _restore(dict(left))
        raise


@contextmanager
def if_interrupted(then: Callable[[], None]) -> Iterator[None]:
    """Calls `then` where what ends the inside is no error: Ctrl-C, or another signal's exception."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        then()
        raise


class Waiting:
    """Threads that wait until something holds, and others that tell them to look again."""

    def __init__(self) -> None:
        self._waiting: list[queue.SimpleQueue[None]] = []

    def until(self, holds: Callable[[], bool], timeout: float) -> bool:
        """Waits until `holds()`, which is asked again at each `look_again`, for `timeout` seconds at most.

        Returns:
            whether it holds.
        """
        told: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting.append(told)
        try:
            deadline = time.monotonic() + timeout
            while not holds():
                try:
                    told.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    return holds()
            return True
        finally:
            self._waiting.remove(told)

    def look_again(self) -> None:
        """Tells all that wait to look again."""
        for told in tuple(self._waiting):
            told.put(None)


def result_of(future: concurrent.futures.Future[T], timeout: float | None) -> T:
    """Waits for a future's result, as its own method does.

    Raises:
        TimeoutError: `timeout` seconds passed.
    """
    arrived: queue.SimpleQueue[None] = queue.SimpleQueue()
    with uninterrupted():
        # Not the future itself: where the wait is interrupted, the two would keep each other, and the result.
        future.add_done_callback(lambda _: arrived.put(None))
    try:
        arrived.get(timeout=timeout)
    except queue.Empty:
        raise concurrent.futures.TimeoutError from None
    with uninterrupted():
        return future.result(0)
