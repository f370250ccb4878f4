"""Positions of a data loader, with a source that is played."""

import pytest

from torchways.controller.data_loader import ArrayLoader
from torchways.data.spec import LoaderSpec, Position

SPEC = LoaderSpec(dataset="module:Name", kwargs={}, rules={})


class Source:
    """Its batches are their numbers, with those of their epochs; its first passes do not begin."""

    def __init__(self, failures=(), is_iterable=False):
        self.failures = list(failures)
        self.num_batches = None if is_iterable else 10

    def begin(self, position):
        if self.failures:
            raise self.failures.pop()
        self.position = position

    def take(self):
        number = self.position.batch
        if number == 10:
            return None
        state = None if self.num_batches else {"next": number + 1}
        self.position = Position(epoch=self.position.epoch, batch=number + 1, state=state)
        return (self.position.epoch, number), self.position

    def close(self):
        pass


def test_a_pass_that_could_not_begin_begins_at_the_same_place_later():
    state = {**ArrayLoader(Source(), SPEC).state_dict(), "epoch": 2, "batch": 5}
    loader = ArrayLoader(Source([OSError("gone"), KeyboardInterrupt()]), SPEC)
    loader.load_state_dict(state)
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error):
            iter(loader)
    assert next(iter(loader)) == (2, 5)
    assert loader.state_dict() == {**state, "batch": 6}
    assert next(iter(loader)) == (3, 0)
    assert loader.state_dict()["epoch"] == 3


@pytest.mark.parametrize("is_iterable", [False, True], ids=["map", "iterable"])
@pytest.mark.parametrize("when", ["with the last batch", "after the pass"])
def test_an_epoch_that_is_over_is_not_read_again(is_iterable, when):
    loader = ArrayLoader(Source(is_iterable=is_iterable), SPEC)
    loader.set_epoch(4)
    for _ in loader:
        state = loader.state_dict()
    if when == "after the pass":
        state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (4, 10)

    loader = ArrayLoader(Source(is_iterable=is_iterable), SPEC)
    loader.load_state_dict(state)
    taken = []
    for epoch in (4, 5):  # as a loop over epochs goes on that wrote down its own number beside the position
        loader.set_epoch(epoch)
        taken.append(list(loader))
        assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (epoch, 10)
    assert taken == [[], [(5, number) for number in range(10)]]

    loader = ArrayLoader(Source(is_iterable=is_iterable), SPEC)
    loader.load_state_dict(state)
    loader.set_epoch(4)
    assert list(loader) == []
    assert next(iter(loader)) == (5, 0)  # epochs count up by themselves from there
    loader.load_state_dict(state)
    assert next(iter(loader)) == (5, 0)
