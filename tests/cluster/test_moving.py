"""A slice moves with all its arrays or stays where it is, whatever fails, interrupts it, or is called meanwhile."""

import asyncio
import contextlib
import random
import signal
import threading

import pytest
import torch
from torch import nn

import torchways as tw
from tests.cluster.conftest import interrupted, raise_keyboard_interrupt, wait_for
from torchways import api
from torchways.errors import ExecutorLost
from torchways.rpc import torchways_pb2 as pb


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a cluster's sockets and logs, without which no process starts."""
    temporary = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        with tw.init(islands=2, devices_per_island=2):
            (found,) = temporary.glob("torchways-*")
            yield found


@contextlib.contextmanager
def nothing_starts(folder):
    """While it lasts, no process of the cluster can be started."""
    aside = folder.rename(folder.with_name("aside"))
    folder.write_text("in the way")
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


class Trainer:
    """A model on a slice, trained by a program that counts its steps there; and a copy of a result."""

    def __init__(self):
        self.mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=0)
        self.model = tw.function(nn.Linear(4, 4), mesh=self.mesh)
        self.count = tw.distribute_tensor(torch.zeros(()), self.mesh)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

        @tw.program(mesh=self.mesh)
        def step(x):
            self.model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            self.count.add_(1)

        self.program = step
        self.num_steps = 0
        self.step()

    def step(self):
        self.program(torch.ones(2, 4))
        self.num_steps += 1

    def values(self):
        return [value.cpu() for value in (self.count, *self.model.state_dict().values())]


@pytest.fixture
def trainer(folder):
    made = Trainer()
    yield made
    made.mesh.close()


def slices():
    """Returns what the resource manager has for this session."""
    session = api._current()
    manager = session.connections.manager
    describing = manager._call(manager._stub.DescribeCluster, pb.DescribeClusterRequest())
    islands = session.connections.loop.run(describing).islands
    return [(island.island_id, item.slice_id) for island in islands for item in island.slices]


def check_stayed(trainer, values, place):
    """Nothing has changed, and nothing is left of the other place."""
    assert (trainer.mesh.island, trainer.mesh.slice_id) == place
    assert all(map(torch.equal, trainer.values(), values))
    wait_for(lambda: slices() == [place], "the other slice to be given back")
    traces = trainer.program.num_traces
    trainer.step()
    assert trainer.count.item() == trainer.num_steps
    assert trainer.program.num_traces == traces


def check_moves(trainer):
    """It moves to the other island after all."""
    values, island = trainer.values(), trainer.mesh.island
    trainer.mesh.remap(island=1 - island)
    assert slices() == [(1 - island, trainer.mesh.slice_id)]
    assert all(map(torch.equal, trainer.values(), values))
    trainer.step()
    assert trainer.count.item() == trainer.num_steps


def test_a_slice_whose_new_executors_cannot_start_stays_where_it_is(trainer, folder):
    values, place = trainer.values(), (trainer.mesh.island, trainer.mesh.slice_id)
    with nothing_starts(folder), pytest.raises(ExecutorLost, match="could not be started"):
        trainer.mesh.remap(island=1)
    check_stayed(trainer, values, place)
    check_moves(trainer)


def test_who_is_interrupted_while_the_new_executors_start_has_the_slice_where_it_was(trainer, monkeypatch):
    values, place = trainer.values(), (trainer.mesh.island, trainer.mesh.slice_id)
    manager = api._current().connections.manager

    async def wait_slice(*_):
        await asyncio.sleep(3600)

    with monkeypatch.context() as patch:
        patch.setattr(manager, "wait_slice", wait_slice)
        interrupted(lambda: trainer.mesh.remap(island=1))
    check_stayed(trainer, values, place)
    check_moves(trainer)


def test_whenever_it_is_interrupted_a_slice_is_here_or_there(trainer):
    check_moves(trainer)  # executors run on both islands now
    generator = random.Random(0)
    saved = signal.signal(signal.SIGALRM, raise_keyboard_interrupt)
    try:
        for number in range(40):
            values = trainer.values()
            try:
                # Python drops an exception that arrives within a `__del__`: it comes again.
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-4, 30e-3), 0.05)
                while True:
                    trainer.mesh.remap(island=1 - trainer.mesh.island)
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert all(map(torch.equal, trainer.values(), values)), number
            place = trainer.mesh.island, trainer.mesh.slice_id
            wait_for(lambda place=place: slices() == [place], "all other slices to be given back")
            trainer.step()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, saved)
    assert trainer.count.item() == trainer.num_steps


def test_a_slice_moves_between_the_calls_of_another_thread(trainer):
    errors, is_over = [], threading.Event()
    numbers, placed = range(1 << 30), []

    def train():
        try:
            for number in numbers:
                trainer.step()
                placed.append((number, tw.distribute_tensor(torch.tensor(number), trainer.mesh)))
                del placed[:-20]
                if is_over.is_set():
                    return
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(10):
            trainer.mesh.remap(island=1 - trainer.mesh.island)
    finally:
        is_over.set()
        thread.join(60)
    assert not errors
    assert trainer.count.item() == trainer.num_steps
    assert all(array.item() == number for number, array in placed)


def test_copies_on_other_slices_and_buffers_that_were_given_up_stay_right(folder):
    meshes = [tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]
    plain = nn.Linear(4, 4)
    ours = tw.replicate(nn.Linear(4, 4), meshes)
    ours.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (ours, plain)]

    def step(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    replicated = tw.program(lambda x: step(ours, optimizers[0], x))
    for moved in (None, 0, 1, 0):
        if moved is not None:
            meshes[moved].remap(island=1 - meshes[moved].island)
        x = torch.randn(4, 4)
        torch.testing.assert_close(replicated(x).item(), step(plain, optimizers[1], x).item())
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[name])
    for mesh in meshes:
        mesh.close()
