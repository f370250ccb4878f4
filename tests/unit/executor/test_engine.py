"""The engine's thread goes on whatever becomes of those who asked it for something."""

import queue
import threading

import pytest

from torchways.executor import engine as module
from torchways.executor.engine import Engine
from torchways.ids import BufferId, client_range, owner


class Idle:
    """A runtime that has nothing to do."""

    def progress(self):
        return False


def test_what_is_cancelled_before_it_runs_is_left_out():
    engine = Engine("i0.e1", Idle(), 1, "127.0.0.1", lambda reported: None, link_key=bytes(32))
    go_on, ran = threading.Event(), []
    engine.call(lambda: go_on.wait(30))
    given_up = engine.run(lambda: ran.append("given up"))
    assert given_up.cancel()
    go_on.set()
    assert engine.run(lambda: "well").result(30) == "well"
    assert not ran

    def fail():
        raise ValueError("its own error")

    with pytest.raises(ValueError, match="its own error"):
        engine.run(fail).result(30)
    assert engine.run(lambda: "still").result(30) == "still"


def test_who_waits_for_a_buffer_that_nothing_makes_is_told_in_the_end(monkeypatch):
    monkeypatch.setattr(module, "_UNKNOWN_BUFFER_SECONDS", 0.2)
    engine = Engine("i0.e1", Idle(), 1, "127.0.0.1", lambda reported: None, link_key=bytes(32), stall_warning=0.1)
    mine, other = (BufferId(client_range(client)[0] + 1) for client in (1, 2))
    engine.run(lambda: engine.clients_with_held_runs.add(owner(other))).result(30)
    told, held, given_up = queue.Queue(), queue.Queue(), queue.Queue()
    engine.fetch(other, held.put)
    engine.cancel_fetch(engine.fetch(mine, given_up.put))
    engine.fetch(mine, told.put)
    assert told.get(timeout=30).message.endswith("but no run makes it")
    engine.fetch(mine, told.put)
    told.get(timeout=30)
    assert held.empty()  # though it is older: its run may be here soon
    assert given_up.empty()
    assert engine.run(engine.num_entries).result(30)["fetches"] == 1
