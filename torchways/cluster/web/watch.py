"""What the page shows: the cluster observed once a second while somebody looks, and the last minute of it.

However many look, the cluster is asked once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from torchways.cluster.operator import hide_names
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.activity import Activity, activity_between

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0
TIMELINE_SECONDS = 60
#: The cluster is watched so long after the last request.
_LINGER_SECONDS = 75.0
#: The first two observations are as far apart, so that the first page has something to show.
_FIRST_SECONDS = 0.25
_OBSERVE_SECONDS = 5.0


class Watch:
    """See the module's docstring. Attributes and methods are the event loop's.

    Args:
        observe: asks the cluster.
    """

    def __init__(self, observe: Callable[[], Awaitable[pb.Observation]]) -> None:
        self._observe = observe
        self._asked = 0.0
        self._task: asyncio.Task[None] | None = None
        self._before: pb.Observation | None = None
        self._after: pb.Observation | None = None
        self._timeline: deque[dict[str, Any]] = deque(maxlen=int(TIMELINE_SECONDS / INTERVAL_SECONDS))
        self._seen = asyncio.Event()

    async def facts(self, *, with_names: bool) -> dict[str, Any]:
        """Returns what the page shows, as JSON has it.

        Raises:
            TimeoutError: the cluster does not answer.
        """
        self._asked = time.monotonic()
        if self._task is None:
            self._seen.clear()
            self._task = asyncio.create_task(self._run(), name="web watch")
            self._task.add_done_callback(self._ended)
        await asyncio.wait_for(self._seen.wait(), 2 * _OBSERVE_SECONDS)
        assert self._before is not None
        assert self._after is not None
        activity = activity_between(_shown(self._before, with_names), _shown(self._after, with_names))
        return {
            "has_names": with_names,
            "timeline_seconds": TIMELINE_SECONDS,
            "timeline": list(self._timeline),
            **dataclasses.asdict(activity),
        }

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = self._before = self._after = None
        self._seen.clear()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the page's watch failed", exc_info=error)

    async def _run(self) -> None:
        pause = _FIRST_SECONDS
        while time.monotonic() < self._asked + _LINGER_SECONDS:
            try:
                found = await asyncio.wait_for(self._observe(), _OBSERVE_SECONDS)
            except TimeoutError:
                logger.info("the cluster did not answer in %g s", _OBSERVE_SECONDS)
                continue
            self._before, self._after = self._after, found
            if self._before is not None:
                self._timeline.append(point(activity_between(self._before, found)))
                self._seen.set()
                pause = INTERVAL_SECONDS
            await asyncio.sleep(pause)


def _shown(found: pb.Observation, with_names: bool) -> pb.Observation:
    if with_names:
        return found
    nameless = pb.Observation()
    nameless.CopyFrom(found)
    hide_names(nameless)
    return nameless


def point(activity: Activity) -> dict[str, Any]:
    """Returns a point of the timeline: of each client, the part of all devices' time that it got."""
    num_devices = sum(len(island.utilisation) for island in activity.islands)
    whole = activity.seconds * max(1, num_devices)
    busy = {str(c.client_id): round(c.device_seconds / whole, 4) for c in activity.clients if c.device_seconds}
    return {"time": activity.time_ns / 1e9, "seconds": round(activity.seconds, 3), "busy": busy}
