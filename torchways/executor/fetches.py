"""Reads of buffers by whoever asks this executor for them: clients, checkpoints."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from torchways.errors import Failure
from torchways.executor import events
from torchways.executor.failures import Failures
from torchways.executor.host_values import to_host
from torchways.executor.launches import Launches
from torchways.executor.stalls import waiting_for
from torchways.executor.state import ExecutorState
from torchways.ids import BufferId, ClientId, owner
from torchways.link.inbox import Inbox
from torchways.runtime.base import Runtime

logger = logging.getLogger(__name__)

#: Called with a value that is computed, or why there is none.
OnFetched: TypeAlias = Callable[["Fetched | Failure"], None]

#: A read may overtake the run that makes its buffer; longer than this it waits only for a run that is known. Where a
#: scheduler that is stopped has that run, it is noticed before, and that is what the reader is told.
_UNKNOWN_BUFFER_SECONDS = 90.0


class _Fetch(NamedTuple):
    """`since`: monotonic seconds."""

    buffer_id: BufferId
    on_fetched: OnFetched
    since: float


class Fetched:
    """A buffer that is computed, for who fetched it: nothing donates it until `end`. On the engine's thread.

    Attributes:
        nbytes: what its value takes on the host.
    """

    def __init__(self, buffer: Any, read: Callable[[Any], torch.Tensor | Failure], end: Callable[[], None]) -> None:
        self.nbytes: int = buffer.numel() * buffer.element_size()
        self._buffer = buffer
        self._read = read
        self._end: Callable[[], None] | None = end

    def read(self) -> torch.Tensor | Failure:
        """Returns the value on the host, where it may be the buffer's own memory; or why it cannot be read."""
        return self._read(self._buffer)

    def end(self) -> None:
        """Lets the buffer go. Further calls do nothing."""
        end, self._end, self._buffer = self._end, None, None
        if end is not None:
            end()


class Fetches:
    """Those that have not been answered. On the engine's thread, but for what says otherwise.

    Args:
        core: is asked for buffers.
        runtime: the devices.
        launches: knows when a buffer is computed.
        inbox: the engine's.
        handle: gives the core an event.
        failure: makes failures.

    Attributes:
        clients_with_held_runs: those whose buffers may be named in reads long before the run that makes them is here.
    """

    def __init__(
        self,
        core: ExecutorState,
        runtime: Runtime,
        launches: Launches,
        inbox: Inbox[events.Event | Callable[[], None]],
        handle: Callable[[events.Event], None],
        failure: Failures,
    ) -> None:
        self.clients_with_held_runs: set[ClientId] = set()
        self._core = core
        self._runtime = runtime
        self._launches = launches
        self._inbox = inbox
        self._handle = handle
        self._failure = failure
        #: Those that are not delivered, oldest first.
        self._waiting: dict[int, _Fetch] = {}
        self._ids = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def fetch(self, buffer_id: BufferId, on_fetched: OnFetched) -> int:
        """See `Engine.fetch`. Any thread."""
        fetch_id = next(self._ids)

        def fetch() -> None:
            self._waiting[fetch_id] = _Fetch(buffer_id, on_fetched, time.monotonic())
            self._handle(events.FetchRequested(fetch_id=fetch_id, buffer_id=buffer_id))

        self._inbox.put(fetch)
        return fetch_id

    def cancel(self, fetch_id: int) -> None:
        """Waits for a buffer no more, if it still does."""
        if self._waiting.pop(fetch_id, None) is not None:
            self._handle(events.FetchCancelled(fetch_id=fetch_id))

    def deliver(self, command: events.Deliver) -> None:
        """Gives a buffer to who asked for it, once it is computed."""
        on_fetched, cell = self._waiting.pop(command.fetch_id).on_fetched, command.cell

        def end() -> None:
            self._inbox.put(events.FetchEnded(cell=cell))

        def computed() -> None:
            if cell.failure is not None:
                on_fetched(cell.failure)
                end()
            else:
                on_fetched(Fetched(cell.buffer, lambda buffer: to_host(self._runtime, buffer, self._failure), end))

        self._launches.when_computed(cell, computed)

    def check(self, now: float) -> None:
        """Ends those that have waited for long for what nothing makes. `now`: monotonic seconds."""
        while self._waiting:
            fetch_id, fetch = next(iter(self._waiting.items()))
            if now < fetch.since + _UNKNOWN_BUFFER_SECONDS:
                return
            runs = waiting_for(self._core)
            if runs or owner(fetch.buffer_id) in self.clients_with_held_runs:
                logger.info("a read of buffer %d waits; runs: %s", fetch.buffer_id, runs[:4])
                del self._waiting[fetch_id]
                self._waiting[fetch_id] = fetch._replace(since=now)
                continue
            self.cancel(fetch_id)
            message = f"buffer {fetch.buffer_id} was awaited for {_UNKNOWN_BUFFER_SECONDS:g} s but no run makes it"
            fetch.on_fetched(self._failure("DeadlineExceeded", message))
