"""Lists and dictionaries that a call is given and changes; no processes."""

import collections

import pytest
import torch

from tests.local_session import LocalSession
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError, UserError
from torchways.parallel.microbatch import run_microbatches

X = torch.arange(4.0)


def collect(x, log):
    log.append(x.sum())
    return x * len(log)


def count(x, numbers):
    numbers["calls"] = numbers.get("calls", 0) + 1
    return x * numbers["calls"]


def keep_two(x, recent):
    recent.appendleft([x.mean(), "mean"])
    return x + sum(value for value, _ in recent)


def take_out(x, batch):
    scale = batch["inner"].pop("scale", 3)
    batch["inner"]["results"] = [x * scale, *batch["names"]]
    batch["names"].reverse()
    return batch


@pytest.fixture
def session():
    return LocalSession()


def plain(tree):
    return torch.utils._pytree.tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, tree)


@pytest.mark.parametrize(
    ("function", "made"),
    [
        (collect, list),
        (count, dict),
        (count, collections.Counter),
        (keep_two, lambda: collections.deque(maxlen=2)),
        (take_out, lambda: {"inner": {"scale": 2}, "names": ["a", "b"]}),
    ],
)
def test_the_caller_sees_what_each_call_changes(session, function, made):
    program = ProgramFunction(function, session.mesh(), lambda: session)
    ours, eager = made(), made()
    for number in range(4):
        assert plain(program(X + number, ours)) == plain(function(X + number, eager))
        assert plain(ours) == plain(eager)


def test_what_was_there_stays_the_same_object(session):
    program = ProgramFunction(take_out, session.mesh(), lambda: session)
    names, first = ["a", "b"], torch.ones(2)
    inner = {"scale": 2, "first": first}
    batch = {"inner": inner, "names": names}
    assert program(X, batch) is batch
    assert batch["inner"] is inner
    assert batch["names"] is names
    assert inner["first"] is first


def test_a_changed_container_of_two_names_is_refused(session):
    log = []
    program = ProgramFunction(lambda x, mine: collect(x, mine) + len(log), session.mesh(), lambda: session)
    with pytest.raises(CaptureError, match=r"changes a list .* also finds in another place, at .*test_containers.py"):
        program(X, log)
    assert log == []


def test_microbatches_change_what_is_their_own(session):
    def first_rows(batch, log=None):
        rows = batch.pop("rows")
        if log is not None:
            log.append(1)
        return rows[:1]

    def step(x, *more):
        return run_microbatches(first_rows, ({"rows": x}, *more), {}, 2, "1F1B")

    for call in (ProgramFunction(step, session.mesh(), lambda: session), step):
        assert call(X).tolist() == [0, 2]
        with pytest.raises(UserError, match=r"test_containers.py.*changes a list that it is given whole"):
            call(X, [])
