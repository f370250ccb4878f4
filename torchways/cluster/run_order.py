"""One order, on all islands, of the runs that span several: so no two islands can wait for each other.

The scheduler of each island that a run has a part on asks for its place when its policy would admit it there. Once all
have asked, the run is next, and all of them are told in one order: they admit it at once. Of one client's runs, the one
that it asked for first goes first on each island.

Pure: no clock, no socket. An island whose scheduler is gone, and one where a client's stream is, is not waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from torchways.ids import ClientId, IslandId, RunId

#: Clients that are gone from an island and are remembered, for what other islands may still ask.
_MAX_GONE_CLIENTS = 10_000


@dataclass(frozen=True, slots=True)
class Ordered:
    """Tell an island that a run is next."""

    island_id: IslandId
    run_id: RunId


@dataclass(slots=True)
class _Asked:
    client_id: ClientId
    islands: tuple[IslandId, ...]
    #: Those that asked, and those of them that will not run it.
    asking: set[IslandId] = field(default_factory=set)
    withdrawn: set[IslandId] = field(default_factory=set)


class RunOrder:
    """See the module's docstring."""

    def __init__(self, max_gone_clients: int = _MAX_GONE_CLIENTS) -> None:
        self._max_gone_clients = max_gone_clients
        self.runs: dict[RunId, _Asked] = {}
        #: Runs that each island asked for and that have no place yet, in the client's order.
        self._queues: dict[tuple[ClientId, IslandId], deque[RunId]] = {}
        self._islands: set[IslandId] = set()
        #: Where a client's stream has ended.
        self._gone: dict[ClientId, set[IslandId]] = {}

    def join(self, island_id: IslandId) -> None:
        """An island's scheduler has come."""
        self._islands.add(island_id)

    def leave(self, island_id: IslandId) -> list[Ordered]:
        """An island's scheduler is gone."""
        self._islands.discard(island_id)
        for key in [key for key in self._queues if key[1] == island_id]:
            del self._queues[key]
        return self._order(list(self.runs))

    def ask(
        self,
        island_id: IslandId,
        run_id: RunId,
        client_id: ClientId,
        islands: Iterable[IslandId],
        *,
        is_withdrawn: bool = False,
    ) -> list[Ordered]:
        """An island asks for a place of a run over `islands`, or (`is_withdrawn`) will not run it."""
        run = self.runs.get(run_id)
        if run is None:
            run = self.runs[run_id] = _Asked(client_id, tuple(dict.fromkeys(islands)))
        key = (run.client_id, island_id)
        if is_withdrawn:
            run.withdrawn.add(island_id)
            if run_id in self._queues.get(key, ()):
                self._remove(key, run_id)
        elif island_id in run.islands and island_id not in run.asking:
            self._queues.setdefault(key, deque()).append(run_id)
        run.asking.add(island_id)
        return self._order([run_id, *self._queues.get(key, ())])

    def client_gone(self, island_id: IslandId, client_id: ClientId) -> list[Ordered]:
        """A client's stream to an island's scheduler has ended: nothing of it will be asked for there."""
        self._gone.setdefault(client_id, set()).add(island_id)
        if len(self._gone) > self._max_gone_clients:
            del self._gone[next(iter(self._gone))]
        return self._order([run_id for run_id, run in self.runs.items() if run.client_id == client_id])

    def _order(self, run_ids: list[RunId]) -> list[Ordered]:
        """Gives a place to all that can have one, of these and of those that wait behind them."""
        result: list[Ordered] = []
        waiting = deque(run_ids)
        while waiting:
            run_id = waiting.popleft()
            run = self.runs.get(run_id)
            if run is None or not self._is_next(run_id, run):
                continue
            del self.runs[run_id]
            for island_id in run.islands:
                key = (run.client_id, island_id)
                if key not in self._queues or self._queues[key][0] != run_id:
                    continue
                self._remove(key, run_id)
                result.append(Ordered(island_id, run_id))
                if key in self._queues:
                    waiting.append(self._queues[key][0])
        return result

    def _is_next(self, run_id: RunId, run: _Asked) -> bool:
        gone = self._gone.get(run.client_id, set())
        for island_id in run.islands:
            queue = self._queues.get((run.client_id, island_id), deque())
            if run_id in queue:
                if queue[0] != run_id:
                    return False
            elif island_id not in run.withdrawn and island_id in self._islands and island_id not in gone:
                return False
        return True

    def _remove(self, key: tuple[ClientId, IslandId], run_id: RunId) -> None:
        queue = self._queues[key]
        queue.remove(run_id)
        if not queue:
            del self._queues[key]
