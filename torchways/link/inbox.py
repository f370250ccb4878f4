"""Where a thread waits for work that other threads give it and for sockets at the same time."""

from __future__ import annotations

import collections
import heapq
import itertools
import os
import select
import selectors
import socket
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

#: epoll's timeouts are rounded up to this; those of select, which can wait for what epoll waits for, are not.
_EPOLL_SECONDS = 0.001


class Inbox(Generic[T]):
    """A queue of items, and sockets whose callbacks run on the one thread that waits.

    `put` may be called on any thread; all else on the thread that waits.
    """

    def __init__(self) -> None:
        self._items: collections.deque[T] = collections.deque()
        #: Items with the times from which they are due (monotonic), and numbers that tell equal ones apart.
        self._later: list[tuple[float, int, T]] = []
        self._numbers = itertools.count()
        self._selector = selectors.EpollSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._sleeping = False

    def put(self, item: T) -> None:
        """Adds an item, and wakes the waiting thread if it sleeps."""
        self._items.append(item)
        if self._sleeping:  # set before the sleeper looks at the items for the last time
            self._sleeping = False
            os.eventfd_write(self._wake, 1)

    def later(self, seconds: float, item: T) -> None:
        """Adds an item after a time."""
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), item))

    def watch(self, watched: socket.socket, callback: Callable[[int], None], events: int) -> None:
        """Calls back with the events that happen, of selectors.EVENT_READ and EVENT_WRITE, until `unwatch`."""
        if watched in self._selector.get_map():
            self._selector.modify(watched, events, callback)
        else:
            self._selector.register(watched, events, callback)

    def unwatch(self, watched: socket.socket) -> None:
        """Ends `watch`."""
        if watched in self._selector.get_map():
            self._selector.unregister(watched)

    def take(self) -> T | None:
        """Returns the oldest item, if there is one."""
        try:
            return self._items.popleft()
        except IndexError:
            return None

    def wait(self, timeout: float | None) -> bool:
        """Waits until there is an item or a socket's callback was called; returns whether there was either.

        It may return True once more for an item that was taken meanwhile.

        Args:
            timeout: seconds; 0 only looks; None waits for ever.
        """
        if self._later:
            now = time.monotonic()
            while self._later and self._later[0][0] <= now:
                self._items.append(heapq.heappop(self._later)[2])
            if self._later:
                left = self._later[0][0] - now
                timeout = left if timeout is None else min(timeout, left)
        self._sleeping = True
        if self._items:
            self._sleeping = False
            timeout = 0
        if timeout is not None and 0 < timeout < _EPOLL_SECONDS:
            select.select([self._selector.fileno()], [], [], timeout)
            timeout = 0
        found = self._selector.select(timeout)
        self._sleeping = False
        for key, events in found:
            if key.fd == self._wake:
                os.eventfd_read(self._wake)
            else:
                key.data(events)
        return bool(found) or bool(self._items)
