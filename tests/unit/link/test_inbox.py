"""A thread that waits at an inbox wakes for items and for sockets, however short it waits, and otherwise in time."""

import selectors
import socket
import threading
import time

import pytest

from torchways.link.inbox import Inbox


@pytest.mark.parametrize("timeout", [0.0005, 60.0, None])
def test_items_and_sockets_end_a_wait(timeout):
    inbox, called = Inbox(), []
    near, far = socket.socketpair()
    inbox.watch(near, called.append, selectors.EVENT_READ)

    def wait(is_there=lambda: True):
        """Waits until something is there; the byte that told of an item may still come when the item is taken."""
        deadline = time.monotonic() + 30
        while not inbox.wait(timeout) or not is_there():
            assert time.monotonic() < deadline

    threading.Timer(0.02, inbox.put, ["item"]).start()
    wait()
    assert inbox.take() == "item"
    assert inbox.take() is None
    threading.Timer(0.02, far.send, [b"x"]).start()
    wait(lambda: called)
    assert called == [selectors.EVENT_READ]
    inbox.unwatch(near)
    assert not inbox.wait(0.0001)  # a byte is still there to read
    inbox.put("early")
    assert inbox.wait(timeout)  # what came before the wait


def test_many_threads_lose_no_item():
    inbox, found = Inbox(), []
    threads = [threading.Thread(target=lambda: [inbox.put(number) for number in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(found) < 4000:
        assert time.monotonic() < deadline
        inbox.wait(0.0005)
        while (item := inbox.take()) is not None:
            found.append(item)
    assert sorted(found) == sorted([*range(1000)] * 4)


@pytest.mark.parametrize("timeout", [0.0005, 60.0, None])
def test_items_for_later_come_when_they_are_due_and_in_that_order(timeout):
    inbox, found, started = Inbox(), [], time.monotonic()
    inbox.later(0.06, "last")
    inbox.later(0.03, "first")
    inbox.later(0.03, "second")
    inbox.put("now")
    deadline = started + 30
    while len(found) < 4:
        assert time.monotonic() < deadline
        inbox.wait(timeout)
        while (item := inbox.take()) is not None:
            found.append(item)
            assert item != "last" or time.monotonic() >= started + 0.06
    assert found == ["now", "first", "second", "last"]
