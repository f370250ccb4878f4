"""`schedule="auto"`: after a few calls of a variant, its loops go on by the best schedule for what their actions took.

The program is partitioned, lowered and registered again, from the graph that was traced; nothing is traced again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torchways.controller.fitting import automatic_loops, choose
from torchways.controller.loop_times import is_whole, measure
from torchways.controller.registration import pieces_of
from torchways.controller.variant import Variant
from torchways.errors import CaptureError
from torchways.ir.stages import schedule_of
from torchways.schedules import Costs, Found
from torchways.schedules.measured import measured_costs

logger = logging.getLogger(__name__)

#: Calls before those that are measured: the first ones find cold caches.
WARM_UP_CALLS = 2
#: Calls that are measured.
MEASURED_CALLS = 3
#: If spans are missing, as of a run that failed, so many further calls are measured, this often.
_MAX_TRIES = 3


def improve_schedules(variant: Variant) -> None:
    """Searches for the schedules of a variant's automatic loops, once enough calls were measured.

    Waits until these are over, and until the program by the new schedules is compiled; later calls run that.
    """
    search = variant.search
    if search is None or search.is_over or variant.num_calls < WARM_UP_CALLS + MEASURED_CALLS * (1 + search.tries):
        return
    measured = measure(variant, list(variant.recent)[-MEASURED_CALLS:])
    loops = automatic_loops(variant.captured)
    if all(is_whole(measured.get(loop.number, ()), loop.num_turns) for loop in loops):
        _search(variant, {number: measured_costs(runs) for number, runs in measured.items() if runs})
        search.is_over = True
        return
    search.tries += 1
    if search.tries == _MAX_TRIES:
        search.is_over = True
        logger.warning(
            "%s: the trace lacks actions of its microbatches, so their schedule stays as it is",
            variant.captured.program.name,
        )


def _search(variant: Variant, costs: Mapping[int, Costs]) -> None:
    assert variant.search is not None
    captured = variant.captured
    before = {loop.number: schedule_of(loop) for loop in automatic_loops(captured)}
    schedules = dict(before)
    found: dict[int, Found] = {}
    for number in before:
        others = {other: schedule for other, schedule in schedules.items() if other != number}
        chosen = choose(captured, number, costs[number], others, variant.meshes, variant.session)
        if chosen is not None:
            captured, found[number] = chosen.captured, chosen.found
            schedules[number] = chosen.found.schedule
    if any(schedules[number].rows != before[number].rows for number in before):
        try:
            variant.replace(captured, pieces_of(captured, variant.meshes, variant.dispatch))
        except CaptureError as error:
            logger.warning("its microbatches go on by the schedule that they have: %s", error)
            return
    variant.search.found = found
    for loop in automatic_loops(variant.captured):
        logger.info("%s: microbatches at %s run by %s", captured.program.name, loop.source, loop.schedule)
