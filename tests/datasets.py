"""Datasets that tests name by import path, as users do."""

import collections
import os
import random
import signal

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

Pair = collections.namedtuple("Pair", ["x", "y"])


class Rows(Dataset):
    """Row i is i, i + 0.5, ...; a dict with a label and a name."""

    def __init__(self, num_rows, width=4):
        self.num_rows, self.width = num_rows, width

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index):
        x = torch.arange(self.width) / 2 + index
        return {"x": x, "label": index, "name": f"row {index}"}


class Noisy(Rows):
    """Rows with random numbers of all generators, as augmentations draw them."""

    def __getitem__(self, index):
        noise = [torch.rand(()), torch.tensor(random.random()), torch.tensor(np.random.rand())]
        return index, torch.stack([value.float() for value in noise])


class RandomOrder(IterableDataset):
    """Numbers in a random order; an iterable that is drawn at once, and one that is drawn number by number."""

    def __init__(self, num_rows, lazily=False):
        self.num_rows, self.lazily = num_rows, lazily

    def __iter__(self):
        if self.lazily:
            return (torch.rand(()) + random.random() for _ in range(self.num_rows))
        return iter(torch.randperm(self.num_rows))


class Bytes(Rows):
    """A row of so many bytes, and a tensor of each kind."""

    def __getitem__(self, index):
        large = torch.full((self.width,), index % 251, dtype=torch.uint8)
        return Pair(large, [torch.tensor(index % 2 == 0), np.float64(index), torch.tensor(index, dtype=torch.bfloat16)])


class Failing(Rows):
    """Row `bad` raises, or ends its process."""

    def __init__(self, num_rows, bad, how):
        super().__init__(num_rows)
        self.bad, self.how = bad, how

    def __getitem__(self, index):
        if index == self.bad:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "stop":
                raise StopIteration
            if self.how == "strange":
                return {"x": object()}
            if self.how == "talk":
                return "x" * 2_000_000
            if self.how == "many":
                return [torch.ones(1)] * 300
            raise ValueError(f"row {index} is broken")
        return super().__getitem__(index)


class Pids(Rows):
    """Rows that say which process reads them."""

    def __getitem__(self, index):
        return os.getpid()


class Refusing:
    """Cannot be made."""

    def __init__(self, reason):
        raise FileNotFoundError(reason)


class Shapeless:
    """Is no dataset."""


class Counting(IterableDataset):
    """Counts; each worker its share. Its iterators know where they are where `keeps_state`."""

    def __init__(self, stop, keeps_state=False, state=None):
        self.stop, self.keeps_state, self.other = stop, keeps_state, state
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        counter = _Counter(self.epoch * 1000, start, step, self.stop)
        return counter if self.keeps_state else iter(list(counter))


class _Counter:
    def __init__(self, offset, start, step, stop):
        self.offset, self.next, self.step, self.stop = offset, start, step, stop

    def __iter__(self):
        return self

    def __next__(self):
        if self.next >= self.stop:
            raise StopIteration
        self.next += self.step
        return self.offset + self.next - self.step

    def state_dict(self):
        return {"next": self.next, "offset": torch.tensor(self.offset)}

    def load_state_dict(self, state):
        self.next, self.offset = state["next"], state["offset"].item()


class BadState(Counting):
    """Has a state that nobody can write down, or one that is too large."""

    def state_dict(self):
        return {"large": bytes(100_000)} if self.keeps_state else {"lock": object()}

    def load_state_dict(self, state):
        pass


def make_rows(*, num_rows):
    """Makes a dataset, as a function."""
    return Rows(num_rows)


def add_up(items):
    """A collate_fn."""
    return {"sum": torch.tensor([float(item["x"].sum()) for item in items]), "names": [item["name"] for item in items]}


def with_noise(items):
    """A collate_fn that draws random numbers."""
    return len(items), torch.stack([torch.rand(()), torch.tensor(random.random()), torch.tensor(np.random.rand())])


NOT_CALLABLE = 3
