"""A session's connections: the resource manager, the schedulers of islands, executors; and what is lost of them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import grpc
import grpc.aio

from torchways.controller.buffers import check_open
from torchways.controller.session.loop import LoopThread
from torchways.errors import ClusterLost, ExecutorLost, Failure, SessionClosed, TorchwaysError
from torchways.ids import IslandId, ProgramId, RunId, client_range
from torchways.rpc.clients import ExecutorClient, ManagerClient, SchedulerClient, SliceAddress
from torchways.rpc.spans import Span
from torchways.signals import Waiting

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: For the answer to a call.
CALL = timedelta(seconds=35)
#: How long a failed read waits for word of why the executor is gone.
_REASON_SECONDS = 3.0


@dataclass(slots=True)
class Connections:
    """See the module's docstring. Methods are for the user's thread unless they say else.

    Attributes:
        manager, loop: the resource manager, and where its answers and all others arrive.
        schedulers: of the islands that this session has slices of, or had.
        executors: of the slices that it has, by their ids; slices of the same devices share them.
        closed: the session is over.
        broken: set when the cluster is gone: every later call raises it.
        pid: the process that it belongs to.
    """

    manager: ManagerClient
    loop: LoopThread
    schedulers: dict[IslandId, SchedulerClient] = field(default_factory=dict)
    executors: dict[str, ExecutorClient] = field(default_factory=dict)
    closed: bool = False
    broken: TorchwaysError | None = None
    pid: int = field(default_factory=os.getpid)
    _is_explained: bool = False
    _next_id: int = 0
    _lost_executors: dict[str, str] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _waiting: Waiting = field(default_factory=Waiting)
    #: Re-entrant: a signal's handler may call us, too.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    # ---- life

    def attach(self, name: str, share: tuple[float, int], spans: Callable[[int], Sequence[Span]]) -> None:
        """Attaches to the resource manager; see `ManagerClient.attach`."""
        self.loop.run(self._attach(name, share, spans), CALL, "the resource manager")
        first, _ = client_range(self.manager.client_id)
        self._next_id = first + 1

    async def _attach(self, name: str, share: tuple[float, int], spans: Callable[[int], Sequence[Span]]) -> None:
        reading = await self.manager.attach(name, share, self._on_executor_lost, self._on_cluster_lost, spans)
        self._tasks.add(reading)
        reading.add_done_callback(self._ended)

    def close(self) -> None:
        """Closes all, and the turn on the loop, whatever happens. It waits for nothing but that. Idempotent."""
        self.closed = True
        if os.getpid() != self.pid or self.loop.closed:  # forked: what it would end is the other process's
            return
        try:
            try:
                self.look_again()
                self.loop.run(self._close(), timedelta(seconds=5), "connections to close")
            finally:
                self.loop.close()
        except Exception:  # the cluster may be gone already; what matters is that it ends
            logger.info("while closing the session", exc_info=True)

    async def _close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        over = SessionClosed("the session was closed meanwhile")
        closings = [client.close(over) for client in self.executors.values()]
        closings += [scheduler.close() for scheduler in self.schedulers.values()]
        closings.append(self.manager.close())
        await asyncio.gather(*closings, return_exceptions=True)

    def check(self) -> None:
        """Raises if the session is closed or the cluster gone."""
        check_open(self, "this call")
        if self.broken is not None:
            raise self.broken

    def is_usable(self) -> bool:
        """Whether there is still something to give back to, and this process may."""
        return not self.closed and self.broken is None and os.getpid() == self.pid

    def new_ids(self, count: int) -> int:
        """Returns the first of `count` consecutive ids that this client has not used. Any thread."""
        with self._lock:
            first, self._next_id = self._next_id, self._next_id + count
        return first

    # ---- slices' ends

    def connect(
        self,
        address: SliceAddress,
        on_program_ready: Callable[[ProgramId, Failure | None], None],
        on_run_finished: Callable[[RunId, Failure | None], None],
    ) -> tuple[ExecutorClient, ...]:
        """Connects to the scheduler and the executors of a slice, and returns these; on the loop."""
        if address.island_id not in self.schedulers:
            scheduler = self.schedulers[address.island_id] = SchedulerClient(
                address.scheduler_address,
                self.manager.metadata,
                on_program_ready,
                on_run_finished,
                self._on_scheduler_lost,
            )
            self.hold(scheduler.connect(), f"scheduler of island {address.island_id}")
        for executor in address.executors:
            if executor.executor_id not in self.executors:
                self.executors[executor.executor_id] = ExecutorClient(
                    executor, self.manager.metadata, self.executor_error
                )
        return tuple(self.executors[executor.executor_id] for executor in address.executors)

    async def disconnect(self, client: ExecutorClient, error: TorchwaysError) -> None:
        """Closes the connection to an executor, whose reads fail."""
        if self.executors.pop(client.executor_id, None) is not None:
            await client.close(error)

    def post(self, island: IslandId, message: Any) -> None:
        """Has the loop send a message, behind all that were sent before: runs, and the releases of what they read."""
        scheduler = self.schedulers[island]
        scheduler.send(message)
        self.loop.call(scheduler.flush)

    def ask_executors(self, ask: Callable[[ExecutorClient], Coroutine[Any, Any, _T]]) -> list[tuple[str, _T]]:
        """Returns each executor's answer, with its id; one that is lost or given back meanwhile has none."""
        answers = []
        for client in list(self.executors.values()):
            try:
                answers.append((client.executor_id, self.loop.run(ask(client), CALL, client.executor_id)))
            except (grpc.aio.UsageError, concurrent.futures.CancelledError):
                if self.executors.get(client.executor_id) is client:
                    raise
            except grpc.aio.AioRpcError as error:
                explaining = self.executor_error(client.executor_id, error)
                explained = self.loop.run(explaining, CALL, "word of an executor")
                if client.executor_id not in self._lost_executors:
                    raise explained from error
        return answers

    # ---- waiting

    def wait(self, holds: Callable[[], bool], who: str, deadline: float = float("inf")) -> None:
        """Waits until something holds, the session is over, or the deadline (`time.monotonic`) has passed."""

        def is_over() -> bool:
            return holds() or self.closed or self.broken is not None

        while (left := deadline - time.monotonic()) > 0 and not self._waiting.until(is_over, min(left, 10)):
            logger.info("%s waits", who)

    def look_again(self) -> None:
        """Tells all that wait to look again. Any thread."""
        self._waiting.look_again()

    def hold(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Runs a coroutine on the loop, where this is called, until it ends or the session does."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.closed:
            logger.error("%s failed", task.get_name(), exc_info=error)

    # ---- what is lost

    async def executor_error(self, executor_id: str, error: grpc.aio.AioRpcError) -> TorchwaysError:
        """Returns the typed error for an executor that cannot be reached, with the reason if word of it comes."""
        deadline = time.monotonic() + _REASON_SECONDS
        while executor_id not in self._lost_executors and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if executor_id in self._lost_executors:
            return self._executor_lost(executor_id)
        if self.broken is not None:
            return self.broken
        return ExecutorLost(f"executor {executor_id} cannot be reached ({error.code().name}: {error.details()})")

    def lost_executor_error(self, clients: Sequence[ExecutorClient]) -> ExecutorLost | None:
        """Returns the error of the first of some executors that is known to be lost. Any thread."""
        lost = [client.executor_id for client in clients if client.executor_id in self._lost_executors]
        return self._executor_lost(lost[0]) if lost else None

    def _executor_lost(self, executor_id: str) -> ExecutorLost:
        return ExecutorLost(
            f"executor {executor_id} is lost ({self._lost_executors[executor_id]}); the arrays on its slice are gone. "
            "Make a new mesh and load your state from a checkpoint"
        )

    def _on_executor_lost(self, executor_id: str, reason: str) -> None:
        if not self.closed:
            self._lost_executors[executor_id] = reason
            logger.warning("executor %s is lost: %s", executor_id, reason)
            if (client := self.executors.get(executor_id)) is not None:
                client.reads.close(self._executor_lost(executor_id))

    def _on_scheduler_lost(self, reason: str) -> None:
        if self.broken is None:
            self._break(reason)

    def _on_cluster_lost(self, reason: str) -> None:
        """The resource manager ends the session, or is gone; it knows more than a connection that is closed."""
        if not self._is_explained:
            self._is_explained = True
            self._break(reason)

    def _break(self, reason: str) -> None:
        """All is over; on the loop."""
        if self.closed:
            return
        self.broken = ClusterLost(f"{reason}; the session's arrays are gone. Start again with tw.init()")
        for client in self.executors.values():
            client.reads.close(self.broken)
        self.look_again()
