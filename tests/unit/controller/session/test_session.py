"""A session that is closed ends all that it has, whatever fails or interrupts it meanwhile."""

import asyncio
import atexit
import signal
from datetime import timedelta
from types import SimpleNamespace

import pytest

import torchways as tw
from torchways import api
from torchways.controller.session import Session
from torchways.controller.session.loop import LoopThread


class Cluster:
    """A cluster whose resource manager and end may be slow, or interrupted once."""

    def __init__(self):
        self.manager = SimpleNamespace(close=self._close)
        self.manager_hangs = self.end_is_interrupted = False
        self.num_ended = 0

    async def _close(self):
        if self.manager_hangs:
            await asyncio.sleep(3600)

    def end(self):
        if self.end_is_interrupted:
            self.end_is_interrupted = False
            raise KeyboardInterrupt
        self.num_ended += 1


@pytest.fixture
def cluster():
    return Cluster()


@pytest.fixture
def session(cluster):
    made = Session(cluster.manager, LoopThread("test"), timedelta(seconds=1), cluster.end)
    yield made
    made.connections.loop.close()


def raising(error):
    def wait(*_):
        raise error

    return wait


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_wait_for_a_checkpoint_that_ends_with_an_error(session, cluster, error):
    session.before_close.append(raising(error))
    with pytest.raises(error):
        session.close()
    assert session.closed
    assert session.connections.loop.closed
    assert cluster.num_ended == 1
    session.close()  # it does not wait again


def test_ctrl_c_while_connections_close(session, cluster):
    cluster.manager_hangs = True
    saved = signal.signal(signal.SIGALRM, raising(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            session.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, saved)
    assert cluster.num_ended == 1
    assert session.connections.loop.closed


def test_a_loop_whose_tasks_do_not_end(session, cluster, monkeypatch):
    monkeypatch.setattr(session.connections.loop, "close", raising(TimeoutError))
    session.close()
    assert cluster.num_ended == 1


def test_shutdown_that_is_interrupted_can_be_called_again(session, cluster, monkeypatch):
    monkeypatch.setattr(api, "_session", session)
    at_exit = []
    monkeypatch.setattr(atexit, "unregister", at_exit.append)
    cluster.end_is_interrupted = True
    with pytest.raises(KeyboardInterrupt):
        tw.shutdown()
    assert (cluster.num_ended, at_exit) == (0, [])
    tw.shutdown()
    assert (cluster.num_ended, at_exit) == (1, [session.close])
    tw.shutdown()
    assert cluster.num_ended == 1
