"""Defers Python's signal handlers, so that an exception of one (Ctrl-C) comes before or after a step, never within."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Signals whose handlers often raise: Ctrl-C, `kill`, time limits.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


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
    for signal_number in _SIGNALS:
        handler = signal.getsignal(signal_number)
        if callable(handler):
            handlers[signal_number] = handler
            signal.signal(signal_number, lambda *arrived: came.append(arrived))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arrived, frame in came:
            handlers[arrived](arrived, frame)
