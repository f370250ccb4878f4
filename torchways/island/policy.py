"""Which client's run a set of devices takes next.

A policy decides for one set of devices. The scheduler (admission.py) asks it each time the devices have room for more
work, and tells it of everything that it needs to decide: runs that came, that were admitted, and that have ended, with
the device time that they took. Policies are pure: no clock, no socket.

A policy of somebody's own that fails must not take the cluster's clients with it: a `GuardedPolicy` serves runs in the
order in which they came from then on.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torchways.config import POLICIES
from torchways.errors import ConfigError
from torchways.ids import ClientId, RunId

logger = logging.getLogger(__name__)

#: Device time, in seconds, that a client may be owed: what it could not use any longer ago is others'.
_MAX_LAG_SECONDS = 0.2
#: Seconds of waiting that are worth one level of priority.
_AGEING_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a client asked for when it joined, within what the cluster allows.

    Attributes:
        client_id: the client.
        name: for people.
        weight: under proportional share, its part of the device time is this in the sum of the weights of all clients
            that have something to run.
        priority: under priority, runs of a higher one go first.
    """

    client_id: ClientId
    name: str = ""
    weight: float = 1.0
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingRun:
    """A run that waits for a set of devices.

    Attributes:
        share: of its client.
        run_id: the run.
        arrived: when it came, in seconds.
        first_since: when it became the first of its client here: it came, or the one before it got its turn.
        seconds: device time that it is expected to take.
    """

    share: Share
    run_id: RunId
    arrived: float
    first_since: float
    seconds: float


@runtime_checkable
class Policy(Protocol):
    """Decides for one set of devices. `next` is asked often: it should not take longer than a few microseconds."""

    def add(self, run: PendingRun, *, was_idle: bool) -> None:
        """A run has come. `was_idle`: its client had no other that waits for these devices or is admitted to them."""

    def next(self, runs: Sequence[PendingRun], now: float) -> PendingRun:
        """Returns the run to admit next: one of `runs`, which are the first of each client that may have one."""
        ...

    def admitted(self, run: PendingRun) -> None:
        """A run is on its way to the devices."""

    def finished(self, run: PendingRun, seconds: float) -> None:
        """An admitted run has ended. `seconds`: the device time that it took."""

    def forget(self, client_id: ClientId) -> None:
        """A client is gone."""


class FirstComeFirstServed:
    """Runs go in the order in which they came."""

    def add(self, run: PendingRun, *, was_idle: bool) -> None:
        """See `Policy`."""

    def next(self, runs: Sequence[PendingRun], now: float) -> PendingRun:
        """See `Policy`."""
        return min(runs, key=_arrival)

    def admitted(self, run: PendingRun) -> None:
        """See `Policy`."""

    def finished(self, run: PendingRun, seconds: float) -> None:
        """See `Policy`."""

    def forget(self, client_id: ClientId) -> None:
        """See `Policy`."""


class ProportionalShare(FirstComeFirstServed):
    """Device time in proportion to weights: stride scheduling (Waldspurger and Weihl, 1995) on measured device time.

    Each client has a *pass*: the device time that it was given, over its weight. The least goes first. A run counts as
    what it is expected to take while it is admitted, and as what it took once it has ended. A client that had nothing
    to run begins at the pass of those that had: what it did not use is not owed to it.
    """

    def __init__(self) -> None:
        self._passes: dict[ClientId, float] = {}
        #: The pass of the client that was served last, which rises.
        self._served = 0.0
        #: When each client was served last, as a count: of equals, who waits for longest goes first.
        self._turns: dict[ClientId, int] = {}
        self._num_turns = 0

    def add(self, run: PendingRun, *, was_idle: bool) -> None:
        """See `Policy`."""
        client_id = run.share.client_id
        mine = self._passes.setdefault(client_id, self._served)
        if was_idle:
            self._passes[client_id] = max(mine, self._served)

    def next(self, runs: Sequence[PendingRun], now: float) -> PendingRun:
        """See `Policy`."""
        for run in runs:
            least = self._served - _MAX_LAG_SECONDS / run.share.weight
            if self._passes[run.share.client_id] < least:
                self._passes[run.share.client_id] = least
        return min(runs, key=self._order)

    def _order(self, run: PendingRun) -> tuple[float, int]:
        client_id = run.share.client_id
        return self._passes[client_id], self._turns.get(client_id, 0)

    def admitted(self, run: PendingRun) -> None:
        """See `Policy`."""
        client_id = run.share.client_id
        self._served = max(self._served, self._passes.get(client_id, 0.0))
        self._num_turns += 1
        if client_id in self._passes:
            self._turns[client_id] = self._num_turns
        self._charge(run, run.seconds)

    def finished(self, run: PendingRun, seconds: float) -> None:
        """See `Policy`."""
        self._charge(run, seconds - run.seconds)

    def _charge(self, run: PendingRun, seconds: float) -> None:
        if run.share.client_id in self._passes:
            self._passes[run.share.client_id] += seconds / run.share.weight

    def forget(self, client_id: ClientId) -> None:
        """See `Policy`."""
        self._passes.pop(client_id, None)
        self._turns.pop(client_id, None)


class StrictPriority(FirstComeFirstServed):
    """The highest priority goes first. Waiting adds to it, one level a second, so that nobody waits for ever.

    A client that asks for many runs ahead gains nothing by it: what waits for its own client's runs does not age.
    """

    def next(self, runs: Sequence[PendingRun], now: float) -> PendingRun:
        """See `Policy`."""
        return min(runs, key=lambda run: (-_aged(run, now), run.first_since))


def _aged(run: PendingRun, now: float) -> float:
    return run.share.priority + (now - run.first_since) / _AGEING_SECONDS


def _arrival(run: PendingRun) -> tuple[float, int]:
    return run.arrived, run.run_id


#: Makes the policy of one set of devices.
PolicyFactory: TypeAlias = Callable[[], Policy]


class GuardedPolicy:
    """A policy until it fails: first come, first served from then on. The log says once why.

    Args:
        factory: makes the policy.
        where: what it decides for, for people.
    """

    def __init__(self, factory: PolicyFactory, where: str) -> None:
        self._name = f"{getattr(factory, '__module__', None)}:{getattr(factory, '__qualname__', repr(factory))}"
        self._where = where
        self._policy: Policy = FirstComeFirstServed()
        try:
            self._policy = factory()
        except Exception:
            self._give_up()

    def add(self, run: PendingRun, *, was_idle: bool) -> None:
        """See `Policy`."""
        try:
            self._policy.add(run, was_idle=was_idle)
        except Exception:
            self._give_up()

    def next(self, runs: Sequence[PendingRun], now: float) -> PendingRun:
        """See `Policy`."""
        try:
            if (run := self._policy.next(runs, now)) in runs:
                return run
            raise ConfigError(f"next(runs, now) must return one of runs, not {run!r}")
        except Exception:
            self._give_up()
            return self._policy.next(runs, now)

    def admitted(self, run: PendingRun) -> None:
        """See `Policy`."""
        try:
            self._policy.admitted(run)
        except Exception:
            self._give_up()

    def finished(self, run: PendingRun, seconds: float) -> None:
        """See `Policy`."""
        try:
            self._policy.finished(run, seconds)
        except Exception:
            self._give_up()

    def forget(self, client_id: ClientId) -> None:
        """See `Policy`."""
        try:
            self._policy.forget(client_id)
        except Exception:
            self._give_up()

    def _give_up(self) -> None:
        self._policy = FirstComeFirstServed()
        logger.exception(
            "policy %s failed; from here on, runs go in the order in which they came on %s", self._name, self._where
        )


#: A run, and how the scheduler calls each method of a policy.
_RUN = PendingRun(share=Share(client_id=ClientId(1)), run_id=RunId(1), arrived=0.0, first_since=0.0, seconds=0.0)
_CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "add": ("add(run, was_idle=...)", (_RUN,), {"was_idle": True}),
    "next": ("next(runs, now)", ([_RUN], 0.0), {}),
    "admitted": ("admitted(run)", (_RUN,), {}),
    "finished": ("finished(run, seconds)", (_RUN, 0.0), {}),
    "forget": ("forget(client_id)", (_RUN.share.client_id,), {}),
}

#: In the order of their names in the settings.
_FACTORIES: tuple[PolicyFactory, ...] = (ProportionalShare, FirstComeFirstServed, StrictPriority)
_POLICIES = dict(zip(POLICIES, _FACTORIES, strict=True))


def check_policy(name: str) -> None:
    """Checks that schedulers will find a policy, before any is started.

    Raises:
        ConfigError: see `find_policy`.
    """
    path = list(sys.path)
    sys.path.insert(0, os.getcwd())  # as a scheduler has it, which Python runs as a module
    try:
        find_policy(name)
    finally:
        sys.path[:] = path


def find_policy(name: str) -> PolicyFactory:
    """Returns a policy by its name, or by "module:Class".

    Raises:
        ConfigError: there is none, it cannot be imported, or its methods cannot be called as a policy's.
    """
    if name in _POLICIES:
        return _POLICIES[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, or module:Class, not {name!r}")
    try:
        factory = getattr(importlib.import_module(module_name), class_name)
        policy = factory()
    except Exception as error:
        raise ConfigError(f"policy {name} cannot be used: {type(error).__name__}: {error}") from error
    if not isinstance(policy, Policy):
        raise ConfigError(f"policy {name} is no policy: see torchways.island.policy.Policy")
    for method, (call, positional, named) in _CALLS.items():
        try:
            inspect.signature(getattr(policy, method)).bind(*positional, **named)
        except TypeError as error:
            raise ConfigError(f"policy {name} cannot be called as {call}: {error}") from error
    found: PolicyFactory = factory
    return found
