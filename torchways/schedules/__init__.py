"""Pipeline schedules: pure functions from numbers of stages, slices and microbatches to a list of actions a slice.

What an action computes, and what flows between actions, others know: this package knows neither programs nor devices.
"""

from torchways.schedules.actions import Action, Kind, Repeat, Schedule, compact, expanded
from torchways.schedules.automatic import AUTO, Found, find_schedule, find_schedules, held_limits
from torchways.schedules.dry_run import UNIT_COSTS, Costs, dry_run
from torchways.schedules.named import SCHEDULES, make_schedule

__all__ = [
    "AUTO",
    "SCHEDULES",
    "UNIT_COSTS",
    "Action",
    "Costs",
    "Found",
    "Kind",
    "Repeat",
    "Schedule",
    "compact",
    "dry_run",
    "expanded",
    "find_schedule",
    "find_schedules",
    "held_limits",
    "make_schedule",
]
