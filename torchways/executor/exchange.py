"""What goes to other executors and comes from them: values of runs, and pieces of sums."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch

from torchways.errors import Failure
from torchways.executor import events
from torchways.executor.failures import Failures
from torchways.executor.host_values import as_sent, to_host
from torchways.executor.launches import Launches
from torchways.executor.loading import PartCode
from torchways.executor.local_sums import LocalSums
from torchways.executor.reduce import Reducer
from torchways.executor.runs import Cell, lowest
from torchways.executor.spans import Spans
from torchways.executor.state import ExecutorState
from torchways.executor.transfer import DataPlane, Outgoing
from torchways.ids import ClientId, PartId, RunId
from torchways.link.inbox import Inbox
from torchways.runtime.base import Runtime


class Exchange:
    """See the module's docstring. For the engine's thread, but for what the data plane calls.

    Args:
        executor_id: this executor.
        host: address that the data plane listens on.
        link_key: the cluster's.
        core: says what is sent and summed, and is told what came.
        runtime: the devices.
        codes: the parts of programs.
        launches: knows when a value is computed.
        inbox: takes what is to be done on the engine's thread.
        is_on_thread: whether the caller is that thread.
        handle: gives the core an event, on that thread.
        spans: where transfers are noted.
        failure: makes failures.
    """

    def __init__(
        self,
        executor_id: str,
        host: str,
        link_key: bytes,
        *,
        core: ExecutorState,
        runtime: Runtime,
        codes: Mapping[PartId, PartCode],
        launches: Launches,
        inbox: Inbox[events.Event | Callable[[], None]],
        is_on_thread: Callable[[], bool],
        handle: Callable[[events.Event], None],
        spans: Spans,
        failure: Failures,
    ) -> None:
        self._me = executor_id
        self._core = core
        self._runtime = runtime
        self._codes = codes
        self._launches = launches
        self._inbox = inbox
        self._is_on_thread = is_on_thread
        self._handle = handle
        self._spans = spans
        self._failure = failure
        self.data_plane = DataPlane(
            executor_id,
            host,
            link_key,
            inbox,
            self._on_arrived,
            self._on_lost,
            self._newest_broken,
            self._on_broken,
        )
        self._reducer = Reducer(executor_id, self._send_piece)
        self._local_sums = LocalSums(executor_id)

    def num_entries(self) -> dict[str, int]:
        """Returns how many entries each collection has."""
        return {"sums": self._reducer.num_open + len(self._local_sums)}

    def drop_client(self, client_id: ClientId) -> None:
        """Ends the sums of a client, of which the core knows that it is gone."""
        failure = self._core.names.client_gone()
        self._reducer.drop_client(client_id, failure)
        for task in self._local_sums.drop_client(client_id):
            self._inbox.put(events.Reduced(task=task, data=None, failure=failure))

    def send(self, command: events.Send) -> None:
        """Sends a value to the peers that receive it, once it is computed."""
        task, edge, cell = command.task, command.instruction.edge_id, command.cell
        run_id = task.run.run_id
        peers = task.run.program.routes.targets[edge]

        left = len(peers)
        started = last = sent_bytes = 0
        failures: list[Failure] = []

        def ended(failure: Failure | None, now: int) -> None:
            nonlocal left, last
            left, last = left - 1, max(last, now)
            failures.extend([failure] if failure is not None else [])
            if left == 0:
                name = f"send edge {edge} to {', '.join(peers)}"
                self._spans.note("send", name, started, last, run_id, edge_id=edge, sent_bytes=sent_bytes)
                self._handle(events.UnitFinished(task=task, failure=lowest(failures)))

        def sent(failure: Failure | None) -> None:
            self._inbox.put(functools.partial(ended, failure, time.time_ns()))  # on the thread of each peer's link

        def send(value: torch.Tensor | Failure) -> None:
            nonlocal started, sent_bytes
            started = time.time_ns()
            if not isinstance(value, Failure):
                sent_bytes = value.nbytes * sum(peer != self._me for peer in peers)
            for peer in peers:
                if peer == self._me:  # to another slice of these devices
                    self._on_arrived(peer, run_id, edge, 0, as_sent(value))
                    sent(None)
                    continue
                if (broken := self._core.mailbox.broken.failure(peer, run_id)) is not None:
                    sent(broken)  # it may have failed there, and what is sent over a new link would lie there for ever
                    continue
                outgoing = Outgoing(run_id=run_id, edge_id=edge, phase=0, value=value, on_sent=sent)
                self.data_plane.send(peer, outgoing)

        if not peers:  # another host sends it
            self._inbox.put(events.UnitFinished(task=task))
            return
        self._when_on_host(cell, send)

    def reduce(self, command: events.Reduce) -> None:
        """Adds a value to those of other slices, once it is computed."""
        task, instruction = command.task, command.instruction
        spec = self._codes[task.run.program.part].slots[instruction.input]
        run_id, edge = task.run.run_id, instruction.edge_id
        route = task.run.program.routes.sums[edge]
        started = time.time_ns()

        def start(value: torch.Tensor | Failure) -> None:
            if self._core.names.is_gone(task.run.client_id):  # other slices of it may bring nothing any more
                self._inbox.put(events.Reduced(task=task, data=None, failure=self._core.names.client_gone()))
                return
            local = self._local_sums.add(task, edge, value, route.num_local)
            if local is None:
                return

            def done(total: torch.Tensor | None, failure: Failure | None, sent_bytes: int) -> None:
                if total is not None:
                    sent_bytes += total.nbytes * len(route.followers)
                name, ended = f"sum edge {edge}", time.time_ns()
                self._spans.note("sum", name, started, ended, run_id, edge_id=edge, sent_bytes=sent_bytes)
                result = total if failure is None else failure
                assert result is not None
                for peer in route.followers:
                    self._reducer.give(peer, run_id, edge, result)
                for number, member in enumerate(local.tasks):
                    own = total if number == 0 or total is None else total.clone()
                    self._inbox.put(events.Reduced(task=member, data=own, failure=failure))

            members = tuple(dict.fromkeys(route.members))
            self._reducer.start(run_id, edge, members, local.total, spec.shape, spec.torch_dtype, done)

        self._when_on_host(command.cell, start)

    def _when_on_host(self, cell: Cell, take: Callable[[torch.Tensor | Failure], None]) -> None:
        """Calls `take` on this thread with a cell's value on the host, once it is computed, or its failure."""

        def computed() -> None:
            take(to_host(self._runtime, cell.buffer, self._failure) if cell.failure is None else cell.failure)

        self._launches.when_computed(cell, computed)

    # ---- what the data plane and the reducer call

    def _send_piece(self, peer: str, run_id: RunId, edge_id: int, phase: int, piece: torch.Tensor | Failure) -> None:
        outgoing = Outgoing(run_id=run_id, edge_id=edge_id, phase=phase, value=piece)

        def send() -> None:
            if self._core.mailbox.broken.failure(peer, run_id) is None:
                self.data_plane.send(peer, outgoing)

        if self._is_on_thread():
            send()
            self.data_plane.flush()  # before the sum, and what follows it here: the others need it as soon
        else:
            self._inbox.put(send)

    def _on_arrived(self, peer: str, run_id: RunId, edge_id: int, phase: int, value: torch.Tensor | Failure) -> None:
        if phase:
            self._reducer.arrived(peer, run_id, edge_id, phase, value)
            return
        now = time.time_ns()
        self._spans.note("receive", f"receive edge {edge_id}", now, now, run_id, edge_id=edge_id)
        data, failure = (None, value) if isinstance(value, Failure) else (value, None)
        self._inbox.put(events.TransferArrived(peer=peer, run_id=run_id, edge_id=edge_id, data=data, failure=failure))

    def _on_lost(self, peer: str, reason: str) -> None:
        failure = self._failure("ExecutorLost", f"executor {peer} is lost, or the link to it: {reason}")
        newest = dict(self._core.newest_runs)
        self._handle(events.PeerLost(peer=peer, failure=failure))
        self._reducer.lose(peer, newest, failure)

    def _newest_broken(self, peer: str) -> Mapping[ClientId, RunId]:
        return self._core.mailbox.broken.newest(peer)

    def _on_broken(self, peer: str, newest: Mapping[ClientId, RunId]) -> None:
        failure = self._failure("ExecutorLost", f"the link to executor {peer} broke; it is there again for later runs")
        self._handle(events.PeerReopened(peer=peer, newest=newest, failure=failure))
        self._reducer.lose(peer, self._core.mailbox.broken.newest(peer), failure)
