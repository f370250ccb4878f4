"""Values on their way from the host to executors: how many and how much may be, and what becomes of those that fail."""

from __future__ import annotations

import concurrent.futures
import copy
from collections.abc import Callable, Collection, Coroutine, Iterable
from datetime import timedelta
from typing import Any, TypeAlias

from torchways.controller.session.loop import wait_for
from torchways.errors import InternalError, TorchwaysError
from torchways.ids import BufferId

#: Values that may be on their way at a time: each has an open file.
_MAX_PUTS = 128
#: What may be on its way, or wait at an executor, for runs in flight: no more is sent until some have ended.
_MAX_RUN_BYTES = 256 << 20

#: Waits until something holds, for somebody's sake.
Wait: TypeAlias = Callable[[Callable[[], bool], str], None]


class Puts:
    """The values of a session that are on their way, by the ids of their buffers.

    Args:
        start: starts a coroutine; its errors are TorchwaysErrors.
        wait: waits until something holds, which may have changed when `changed` was called.
        changed: tells who waits.
        failed: called when a value has not arrived.
    """

    def __init__(
        self,
        start: Callable[[Coroutine[Any, Any, None]], concurrent.futures.Future[None]],
        wait: Wait,
        changed: Callable[[], None],
        failed: Callable[[BufferId], None],
    ) -> None:
        self._start = start
        self._wait = wait
        self._changed = changed
        self._failed = failed
        self._under_way: dict[BufferId, concurrent.futures.Future[None]] = {}
        self._errors: dict[BufferId, TorchwaysError] = {}
        #: Of runs in flight, and of the run that is made.
        self._run_bytes = self._next_run_bytes = 0

    # ---- values

    def make_room(self) -> None:
        """Waits while too many values are on their way."""
        if len(self._under_way) >= _MAX_PUTS:
            self._wait(lambda: len(self._under_way) < _MAX_PUTS, "a value of the host")

    def add(self, buffer_id: BufferId, putting: Coroutine[Any, Any, None]) -> None:
        """Starts putting a value."""
        future = self._under_way[buffer_id] = self._start(putting)
        future.add_done_callback(lambda _: self._end(buffer_id, future))

    def _end(self, buffer_id: BufferId, future: concurrent.futures.Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            if not isinstance(error, TorchwaysError):
                error = InternalError(f"a value could not be put: {error!r}")
            # Not the error itself, with which who waits for the future raises: its frames have the buffer.
            self._errors[buffer_id] = copy.copy(error).with_traceback(None)
        self._under_way.pop(buffer_id, None)
        if error is not None:
            self._failed(buffer_id)
        if len(self._under_way) == _MAX_PUTS - 1:
            self._changed()

    def under_way(self, buffer_id: BufferId) -> concurrent.futures.Future[None] | None:
        """Returns what a value's arrival can be awaited with; None: it has arrived, or has not been put."""
        return self._under_way.get(buffer_id)

    def error(self, buffer_id: BufferId) -> TorchwaysError | None:
        """Returns why a value has not arrived, if so."""
        return self._errors.get(buffer_id)

    def check(self, buffer_id: BufferId) -> None:
        """Raises the error of a value that has not arrived."""
        if (error := self.error(buffer_id)) is not None:
            raise copy.copy(error)  # the frames that it passes stay with the copy: they have the buffer

    def wait_for(self, buffer_id: BufferId, timeout: timedelta) -> None:
        """Waits until a value has arrived.

        Raises:
            TorchwaysError: it has not.
        """
        if (putting := self.under_way(buffer_id)) is not None:
            wait_for(putting, timeout, "a value of the host to arrive", gives_up=False)
        self.check(buffer_id)

    def forget(self, buffer_id: BufferId) -> None:
        """Nobody has the buffer any more."""
        self._errors.pop(buffer_id, None)

    # ---- runs

    def awaited(self, buffer_ids: Iterable[BufferId]) -> Collection[BufferId]:
        """Returns those of a run's arguments that are on their way.

        Raises:
            TorchwaysError: one of them has not arrived.
        """
        if not self._under_way and not self._errors:
            return ()
        found = list(buffer_ids)
        for buffer_id in found:
            self.check(buffer_id)
        return [buffer_id for buffer_id in found if buffer_id in self._under_way]

    def make_room_for_run(self, nbytes: int) -> None:
        """Waits while too much is on its way for runs, and counts more for the next run."""

        def has_room() -> bool:
            return not self._run_bytes or self._run_bytes + nbytes <= _MAX_RUN_BYTES

        if not has_room():
            self._wait(has_room, "a tensor of the host")
        self._next_run_bytes += nbytes

    def run_sent(self) -> int:
        """Returns the bytes that count for the run that is sent; see `run_ended`."""
        nbytes, self._next_run_bytes = self._next_run_bytes, 0
        self._run_bytes += nbytes
        return nbytes

    def run_ended(self, nbytes: int) -> None:
        """A run is over whose values have so many bytes."""
        if nbytes:
            self._run_bytes -= nbytes
            self._changed()
