"""What a real accelerator's queues do, and no more: a model to show deadlocks with.

Each device is a queue that runs one computation at a time, in the order of enqueueing, and never interrupts one. A
computation of a gang is in the queue of every device of the gang; it starts when it is at the head of all of them.
Pure: no clock, no socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Gang:
    parts: int
    devices: list[int] = field(default_factory=list)
    enqueued: int = 0


class FifoDevices:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._queues: dict[int, deque[str]] = {}
        self._gangs: dict[str, _Gang] = {}
        self._running: set[str] = set()

    def enqueue(self, key: str, devices: Iterable[int], parts: int) -> list[str]:
        """Puts one host's part of a computation into its devices' queues; returns what starts.

        Args:
            key: names the computation; the same on all hosts.
            devices: of this host.
            parts: number of hosts.
        """
        gang = self._gangs.setdefault(key, _Gang(parts))
        gang.enqueued += 1
        for device in devices:
            gang.devices.append(device)
            self._queues.setdefault(device, deque()).append(key)
        return self._start([key])

    def finish(self, key: str) -> list[str]:
        """Takes a computation that ran off its devices; returns what starts."""
        self._running.discard(key)
        gang = self._gangs.pop(key)
        heads: dict[str, None] = {}
        for device in gang.devices:
            queue = self._queues[device]
            queue.remove(key)
            if queue:
                heads[queue[0]] = None
        return self._start(list(heads))

    @property
    def num_waiting(self) -> int:
        """Computations that are enqueued and do not run."""
        return len(self._gangs) - len(self._running)

    def deadlock(self) -> list[str]:
        """Returns computations that wait for each other in a circle; empty if there are none."""
        # Each waits for those that are ahead of it.
        ahead: dict[str, set[str]] = {key: set() for key in self._gangs}
        for queue in self._queues.values():
            for before, behind in zip(queue, list(queue)[1:], strict=False):
                ahead[behind].add(before)
        done: set[str] = set()
        for start in ahead:
            circle = _circle(ahead, start, done)
            if circle:
                return circle
        return []

    def _start(self, candidates: Sequence[str]) -> list[str]:
        started = []
        for key in candidates:
            gang = self._gangs[key]
            at_head = all(self._queues[device][0] == key for device in gang.devices)
            if key not in self._running and gang.enqueued == gang.parts and at_head:
                self._running.add(key)
                started.append(key)
        return started


def _circle(ahead: dict[str, set[str]], start: str, done: set[str]) -> list[str]:
    path: list[str] = []
    on_path: set[str] = set()
    stack: list[tuple[str, bool]] = [(start, False)]
    while stack:
        key, leave = stack.pop()
        if leave:
            path.pop()
            on_path.discard(key)
            done.add(key)
        elif key in on_path:
            return path[path.index(key) :]
        elif key not in done:
            path.append(key)
            on_path.add(key)
            stack.append((key, True))
            stack.extend((before, False) for before in sorted(ahead[key]))
    return []
