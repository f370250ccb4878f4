"""Positions of a data loader, with a source that is played."""

import pytest

from torchways.controller.data_loader import ArrayLoader
from torchways.data.spec import LoaderSpec, Position


class Source:
    """Its batches are their numbers; its first passes do not begin."""

    num_batches = 10

    def __init__(self, failures):
        self.failures = failures

    def begin(self, position):
        if self.failures:
            raise self.failures.pop()
        self.position = position

    def take(self):
        self.position = Position(epoch=self.position.epoch, batch=self.position.batch + 1)
        return self.position.batch - 1, self.position

    def close(self):
        pass


def test_a_pass_that_could_not_begin_begins_at_the_same_place_later():
    spec = LoaderSpec(dataset="module:Name", kwargs={}, rules={})
    state = {**ArrayLoader(Source([]), spec).state_dict(), "epoch": 2, "batch": 5}
    loader = ArrayLoader(Source([OSError("gone"), KeyboardInterrupt()]), spec)
    loader.load_state_dict(state)
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error):
            iter(loader)
    assert next(iter(loader)) == 5
    assert loader.state_dict() == {**state, "batch": 6}
    assert next(iter(loader)) == 0
    assert loader.state_dict()["epoch"] == 3
