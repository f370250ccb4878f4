"""Ctrl-C in a training loop: a call has happened, or it has not. Afterwards the model is there and goes on learning."""

import random
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from tests.cluster.conftest import interrupted, raise_keyboard_interrupt
from torchways.errors import RunCancelled


@pytest.fixture(scope="module")
def trainer():
    with tw.init(islands=2, devices_per_island=1):
        meshes = [tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in range(2)]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        model = tw.pipeline(model, split_spec={"2": tw.SplitPoint.BEGINNING}, meshes=meshes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        counted = []

        @tw.program
        def step(x, y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            counted.append(loss.detach())
            return loss

        x, y = torch.randn(8, 8), torch.randint(0, 4, (8,))
        step(x, y).item()
        yield lambda: step(x, y), model, optimizer, counted


def _interrupt_often(trainer, tries):
    step, model, optimizer, counted = trainer
    generator = random.Random(0)

    saved = signal.signal(signal.SIGALRM, raise_keyboard_interrupt)
    num_interrupted = 0
    try:
        for number in range(tries):
            try:
                # Python drops an exception that arrives within a `__del__`: it comes again.
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-4, 4e-3), 0.05)
                while True:
                    step()
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
                num_interrupted += 1
            if number % 10 == 0 or number == tries - 1:
                state = model.state_dict()
                assert all(value.isfinite().all() for value in state.values())
                # Each call that happened has left all it leaves: the loss, and one step of each parameter.
                steps = {int(value["step"].item()) for value in optimizer.state.values()}
                assert steps == {len(counted)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, saved)
    assert num_interrupted == tries


def test_interrupts_lose_nothing(trainer):
    _interrupt_often(trainer, 60)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_interrupts_lose_nothing(trainer):
    _interrupt_often(trainer, 1000)


def test_state_is_read_beside_training_by_another_thread(trainer):
    step, model, *_ = trainer
    errors, done = [], threading.Event()

    def train():
        try:
            for _ in range(100):
                step()
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=train)
    thread.start()
    num_reads = 0
    while not done.is_set() or not num_reads:
        assert all(value.isfinite().all() for value in model.state_dict().values())
        num_reads += 1
    thread.join(60)
    assert not errors


@pytest.mark.parametrize("read", [lambda array: array.cpu(), lambda array: tw.get([array])], ids=["cpu", "get"])
def test_who_is_interrupted_while_reading_wants_the_value_no_more(trainer, read):
    mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)

    @tw.function(mesh=mesh)
    def slow(m):
        for _ in range(40):
            m = (m @ m) / 512
        return m.max()

    ones = tw.distribute_tensor(torch.ones(512, 512), mesh)
    assert slow(ones).item() == 1
    others = [slow(ones) for _ in range(30)]  # more than is admitted for a client that is alone
    last = slow(ones)
    interrupted(lambda: read(last))
    with pytest.raises(RunCancelled, match="its reader was interrupted"):
        last.item()
    assert {value.item() for value in others} == {1}  # nobody was interrupted who read these


def test_a_step_that_updates_state_goes_on_when_its_reader_is_interrupted(trainer):
    mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
    model = tw.parallelize_module(nn.Linear(256, 256), mesh, None)

    @tw.program
    def grow(m):
        with torch.no_grad():
            model.weight.add_(1)
        for _ in range(40):
            m = (m @ m) / 512
        return m.max() + model.weight.sum() * 0

    ones = tw.distribute_tensor(torch.ones(512, 512), mesh)
    grow(ones).item()
    before = model.weight.detach().cpu()
    results = [grow(ones) for _ in range(5)]
    interrupted(lambda: results[-1].cpu())
    assert results[-1].item() == 1
    torch.testing.assert_close(model.weight.detach().cpu(), before + 5)


def test_a_step_that_is_cancelled_while_it_is_held_fails_no_call_before_it(trainer):
    """It gives up the state that these read, and comes to the devices after them all the same."""
    mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
    model = tw.parallelize_module(nn.Linear(512, 512), mesh, None)

    def heavy(m):
        for _ in range(40):
            m = (m @ m) / 512
        return m.max() + model.weight.sum() * 0

    @tw.program
    def step(m):
        with torch.no_grad():
            model.weight.add_(1)
        return heavy(m)

    infer = tw.program(heavy)
    ones = tw.distribute_tensor(torch.ones(512, 512), mesh)
    assert infer(ones).item() == step(ones).item() == infer(ones).item() == 1
    results = [infer(ones) for _ in range(30)]  # more than is admitted for a client that is alone
    loss = step(ones)
    tw.cancel(loss)
    assert {result.item() for result in results} == {1}
    with pytest.raises(RunCancelled):
        loss.item()
    with pytest.raises(RunCancelled):
        model.weight.cpu()
