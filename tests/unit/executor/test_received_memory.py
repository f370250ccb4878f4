"""The memory of large values that came is kept for those to come."""

import threading

import pytest

from torchways.executor import received_memory as module
from torchways.executor.received_memory import ReceivedMemory


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(module, "_MIN_BYTES", 1000)
    monkeypatch.setattr(module, "_KEPT_BYTES", 10_000)
    return ReceivedMemory()


def test_a_value_that_fits_gets_the_memory_of_one_that_was_let_go(memory):
    first = memory.take(4000)
    place = first.data_ptr()
    assert place % 64 == 0  # XLA takes it without a copy
    part = first[10:].view(-1)
    del first
    other = memory.take(4000)
    assert other.data_ptr() != place  # a view has it still
    del part
    again = memory.take(3000)
    assert len(again) == 3000
    assert again.data_ptr() == place
    del again
    assert memory.take(5000).data_ptr() != place  # too large for it
    assert memory.take(1500).data_ptr() != place  # most of it would be wasted


def test_no_more_is_kept_than_a_limit_and_nothing_once_it_is_cleared(memory):
    values = [memory.take(4000) for _ in range(4)]
    assert len({value.data_ptr() for value in values}) == 4
    values.clear()
    assert len(memory._free) == 2
    memory.clear()
    assert not memory._free
    memory.take(10)  # malloc's
    assert not memory._free


def test_values_in_use_on_several_threads_share_no_memory(memory):
    wrong = []

    def receive(number):
        for _ in range(300):
            values = [memory.take(2000) for _ in range(3)]
            for position, value in enumerate(values):
                value.fill_(10 * number + position)
            wrong.extend(v for p, v in enumerate(values) if not bool((v == 10 * number + p).all()))

    threads = [threading.Thread(target=receive, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
