"""Policies of one's own: which are refused, and what becomes of one that fails."""

import pytest

from tests.unit.island.test_admission import Cluster
from torchways.errors import ConfigError
from torchways.island.policy import FirstComeFirstServed, check_policy


class WithoutTime(FirstComeFirstServed):
    def next(self, runs):
        return runs[0]


class WithoutIdle(FirstComeFirstServed):
    def add(self, run):
        pass


class NoPolicy:
    pass


class FailsLater(FirstComeFirstServed):
    """It raises in the method `where`, at the call numbered `after`."""

    where, after = "next", 3

    def __init__(self):
        self.calls = 0

    def _called(self, name):
        if name == self.where:
            self.calls += 1
            if self.calls >= self.after:
                raise ZeroDivisionError("a mistake")

    def add(self, run, *, was_idle):
        self._called("add")

    def next(self, runs, now):
        self._called("next")
        return runs[-1]

    def admitted(self, run):
        self._called("admitted")

    def finished(self, run, seconds):
        self._called("finished")

    def forget(self, client_id):
        self._called("forget")


class ChoosesNothing(FirstComeFirstServed):
    def next(self, runs, now):
        return None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("WithoutTime", r"cannot be called as next\(runs, now\): too many positional arguments"),
        ("WithoutIdle", r"cannot be called as add\(run, was_idle=...\): got an unexpected keyword argument 'was_idle'"),
        ("NoPolicy", r"is no policy: see torchways\.island\.policy\.Policy"),
        ("Missing", "cannot be used: AttributeError"),
    ],
)
def test_what_cannot_be_called_as_a_policy_is_refused(name, reason):
    with pytest.raises(ConfigError, match=reason):
        check_policy(f"{__name__}:{name}")


def test_a_policy_of_ones_own_is_accepted():
    check_policy(f"{__name__}:FailsLater")


def _play(policy):
    """Two clients with 10 runs each on one executor."""
    cluster = Cluster(["a"], policy=policy)
    programs = {}
    for client in (1, 2):
        cluster.join(client, "a")
        programs[client] = cluster.program(client, 0, "a")
    for number in range(10):
        for client in (1, 2):
            came = 0.0002 * number + 0.0001 * client
            cluster.at(came, lambda c=client, n=number: cluster.run(programs[c], c * 10**6 + n, 0.01))
    cluster.go()
    assert cluster.all_finished()
    return cluster


@pytest.mark.parametrize("where", ["add", "next", "admitted", "finished"])
def test_after_an_exception_runs_go_in_the_order_in_which_they_came(where, caplog):
    cluster = _play(type("Mine", (FailsLater,), {"where": where}))
    computed = [(run_id % 10**6, run_id // 10**6) for _, _, _, run_id in cluster.computed]
    assert computed[10:] == sorted(computed[10:])
    [record] = [record for record in caplog.records if record.name == "torchways.island.policy"]
    assert record.getMessage() == (
        f"policy {__name__}:Mine failed; from here on, runs go in the order in which they came on a"
    )
    assert "ZeroDivisionError: a mistake" in caplog.text


def test_what_is_none_of_the_runs_is_an_error_of_the_policy(caplog):
    _play(ChoosesNothing)
    assert "ConfigError: next(runs, now) must return one of runs, not None" in caplog.text


def test_a_policy_that_cannot_be_made_is_an_error_of_the_policy(caplog):
    class Broken(FirstComeFirstServed):
        def __init__(self):
            raise ZeroDivisionError("a mistake")

    _play(Broken)
    assert caplog.text.count("Broken failed; from here on") == 1
