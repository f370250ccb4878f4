"""Signal handlers are themselves again after `uninterrupted`, and who waits is told."""

import concurrent.futures
import gc
import os
import signal
import threading
import weakref
from types import SimpleNamespace

import pytest

from torchways import signals
from torchways.controller.session.runs import Runs, _Run
from torchways.signals import Waiting, result_of, uninterrupted

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


class Came(Exception):
    """A signal's handler ran."""


@pytest.fixture
def handler():
    """What handles the three signals: it raises."""

    def raises(number, frame):
        raise Came(number)

    before = {number: signal.signal(number, raises) for number in _NUMBERS}
    yield raises
    for number, earlier in before.items():
        signal.signal(number, earlier)


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM,), _NUMBERS])
def test_handlers_are_restored_though_signals_come_meanwhile(handler, monkeypatch, numbers):
    to_come = set(numbers)

    def set_handler(number, new):
        signal.signal(number, new)
        if new is handler and number in to_come:  # just after it was restored
            to_come.discard(number)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(signals, "_signal", SimpleNamespace(getsignal=signal.getsignal, signal=set_handler))
    with pytest.raises(Came), uninterrupted():
        pass
    assert to_come == set()
    assert [signal.getsignal(number) for number in _NUMBERS] == [handler] * 3


def test_who_is_interrupted_while_waiting_for_a_result_does_not_keep_it(handler):
    class Result:
        """Something that counts."""

    future = concurrent.futures.Future()
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with pytest.raises(Came):
        result_of(future, 20)
    result = Result()
    future.set_result(result)
    lives = weakref.ref(result)
    gc.disable()
    try:
        del future, result
        assert lives() is None
    finally:
        gc.enable()


def test_a_wait_has_one_deadline_however_often_it_looks_again():
    waiting, found = Waiting(), []
    thread = threading.Thread(target=lambda: found.append(waiting.until(lambda: False, 0.2)), daemon=True)
    thread.start()
    for _ in range(200):
        waiting.look_again()
        thread.join(0.05)
    assert found == [False]


def test_each_of_two_threads_that_wait_for_runs_is_woken_for_its_own():
    waiting = Waiting()
    connections = SimpleNamespace(
        wait=lambda holds, who: waiting.until(holds, 60), look_again=waiting.look_again, check=lambda: None
    )
    puts = SimpleNamespace(run_ended=lambda num_bytes: None)
    runs = Runs(connections, None, None, puts, None, 64)
    for run_id in (1, 2, 3):
        runs._runs[run_id] = _Run("f", (0,), 1, range(0), None, False, 0, ())
    threads = []
    for run_id in (1, 2):
        threads.append(threading.Thread(target=runs.wait_for, args=(run_id,), daemon=True))
        threads[-1].start()
        while len(waiting._waiting) < run_id:
            pass
    for thread, run_id in zip(threads, (1, 2), strict=True):
        runs.on_finished(run_id, None)
        thread.join(20)
        assert not thread.is_alive()
    assert runs._awaited == []
