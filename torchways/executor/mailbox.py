"""Where the values that peers send meet the units that receive them, whichever is first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torchways.errors import Failure
from torchways.executor.broken import BrokenLinks
from torchways.executor.events import TransferArrived
from torchways.executor.runs import Task
from torchways.ids import ClientId, RunId, owner
from torchways.ir.part import EdgeId

#: The sender is part of it: another executor cannot send in its place.
_Key: TypeAlias = tuple[str, RunId, EdgeId]


class Mailbox:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._arrived: dict[_Key, TransferArrived] = {}
        self._receiving: dict[_Key, Task] = {}
        self.broken = BrokenLinks()

    def receive(self, task: Task, edge_id: EdgeId) -> TransferArrived | Failure | None:
        """Returns the value for a task, or why none will come, if that is known; else call `expect`."""
        key = _key(task, edge_id)
        return self._arrived.pop(key, None) or self.broken.failure(key[0], key[1])

    def expect(self, task: Task, edge_id: EdgeId) -> None:
        """Lets a task wait for its value."""
        self._receiving[_key(task, edge_id)] = task

    def arrive(self, event: TransferArrived) -> Task | None:
        """Returns the task that waits for a value; if none does, call `keep`."""
        return self._receiving.pop((event.peer, event.run_id, event.edge_id), None)

    def keep(self, event: TransferArrived) -> None:
        """Keeps a value for the task that will receive it."""
        self._arrived[event.peer, event.run_id, event.edge_id] = event

    def edges_of(self, run_id: RunId) -> list[EdgeId]:
        """Returns the edges over which a run waits for values."""
        return [edge_id for _, known, edge_id in self._receiving if known == run_id]

    def lose(self, peer: str, newest: Mapping[ClientId, RunId], failure: Failure) -> list[Task]:
        """Takes note that of runs up to these nothing more comes from a peer; returns the tasks that wait for it."""
        self.broken.note(peer, newest, failure)
        return self._give_up([key for key in self._receiving if key[0] == peer and self.broken.failure(peer, key[1])])

    def drop_client(self, client_id: ClientId) -> list[Task]:
        """Forgets the values of a client's runs; returns the tasks that wait for some."""
        self.broken.drop_client(client_id)
        for key in [key for key in self._arrived if owner(key[1]) == client_id]:
            del self._arrived[key]
        return self._give_up([key for key in self._receiving if owner(key[1]) == client_id])

    def _give_up(self, keys: list[_Key]) -> list[Task]:
        return [self._receiving.pop(key) for key in keys]


def _key(task: Task, edge_id: EdgeId) -> _Key:
    return task.run.program.routes.senders[edge_id], task.run.run_id, edge_id
