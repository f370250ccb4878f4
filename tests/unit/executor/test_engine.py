"""The engine's thread goes on whatever becomes of those who asked it for something."""

import threading

import pytest

from torchways.executor.engine import Engine


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
