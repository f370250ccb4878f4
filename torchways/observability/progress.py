"""A line on the terminal that says what a call waits for, when it takes long enough to look like a hang."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_AFTER_SECONDS = 3.0
_EVERY_SECONDS = 1.0


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Says "what, 7 s" on stderr from some seconds on, where that is a terminal; the line goes when the work ends."""
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_say, args=(what, ended), name="torchways-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _say(what: str, ended: threading.Event) -> None:
    started = time.monotonic()
    wait, has_said = _AFTER_SECONDS, False
    while not ended.wait(wait):
        print(f"\r{what}, {time.monotonic() - started:.0f} s", end="", file=sys.stderr, flush=True)
        wait, has_said = _EVERY_SECONDS, True
    if has_said:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
