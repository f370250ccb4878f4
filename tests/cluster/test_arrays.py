"""Arrays on real slices outside programs: written, cast, read while another thread trains, used around forks."""

import copy
import multiprocessing
import os
import threading
from datetime import timedelta

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import torchways as tw
from torchways.api import _current
from torchways.controller.buffers import HostBuffer, host_array
from torchways.errors import UserError


@pytest.fixture(scope="module")
def mesh():
    with tw.init(islands=1, devices_per_island=2):
        yield tw.init_device_mesh((2,), mesh_dim_names=("dp",))


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def place(mesh, model):
    return tw.parallelize_module(model, mesh, {"0.weight": ("dp", None)})


def trainer(model, optimizer):
    @tw.program
    def step(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def test_values_written_from_python_are_trained_on_where_they_were(mesh):
    plain = build()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # before the model is placed: its parameters become arrays
    model = place(mesh, model)
    step = trainer(model, optimizer)
    x, y = batch()
    for number in range(3):
        expected = F.cross_entropy(plain(x), y)
        expected.backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        assert step(x, y).item() == pytest.approx(expected.item(), rel=1e-5)
        with torch.no_grad():
            for item in (model, plain):
                item[0].weight[number, 2] = 0.5
                item[0].weight.view(-1)[:3].mul_(2)
                item[2].bias.data.fill_(0.1)
                for parameter in item.parameters():
                    parameter.clamp_(-0.4, 0.4)
    assert (model[0].weight.mesh, model[0].weight.sharding) == (mesh, ("S(0)",))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_a_cast_model_goes_on_and_its_copy_is_its_own(mesh):
    plain = build()
    model = place(mesh, copy.deepcopy(plain))
    x, _ = batch()
    torch.testing.assert_close(model(x).cpu(), plain(x).detach())
    other = copy.deepcopy(model)
    other.double()
    assert (other[0].weight.dtype, other[0].weight.mesh, other[0].weight.sharding) == (torch.float64, mesh, ("S(0)",))
    torch.testing.assert_close(other(x.double()).cpu(), plain.double()(x.double()).detach())
    torch.testing.assert_close(model(x).cpu(), plain.float()(x).detach())


def test_a_placed_model_is_cast_on_its_slice(mesh, monkeypatch):
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model = place(mesh, copy.deepcopy(plain))
    x = torch.linspace(-3, 3, 32).view(8, 4)
    torch.testing.assert_close(model(x).cpu(), plain(x).detach())
    for cast in (nn.Module.double, nn.Module.half, nn.Module.float, lambda module: module.to(torch.bfloat16)):
        with monkeypatch.context() as patch:
            patch.setattr(type(_current().values), "start_fetch", None)  # whatever reads a value of a slice comes here
            cast(model)
        cast(plain)
        assert (model[0].weight.mesh, model[0].weight.sharding) == (mesh, ("S(0)",))
        for name, value in plain.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def test_an_array_whose_buffer_does_not_fit_fails_its_run_and_no_more(mesh):
    array = host_array(torch.ones(4))
    double = tw.program(lambda: array * 2, mesh=mesh)
    assert double().tolist() == [2.0] * 4
    wrong = host_array(torch.ones(3, dtype=torch.float64))
    session = _current()
    array._buffer = session.values.put(wrong._buffer, mesh, ("R",))
    with pytest.raises(UserError, match=r"is an array of float64\[3\], and the program was traced for float32\[4\]"):
        double().cpu()
    array._buffer = HostBuffer(host_array(torch.ones(4))._buffer.value)
    assert double().tolist() == [2.0] * 4


def test_reads_while_another_thread_trains_give_an_older_or_newer_value(mesh):
    counts = nn.Module()
    counts.register_buffer("one", torch.zeros(64))
    counts.register_buffer("other", torch.zeros(64))

    def forward():
        counts.one += 1
        counts.other += 1
        return counts.one.sum()

    counts.forward = forward
    counts = tw.function(counts, mesh=mesh)
    step = tw.program(lambda: counts())
    step().item()
    stop, failures = threading.Event(), []

    def train():
        try:
            while not stop.is_set():
                with _current().lock:
                    step()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    last = 0.0
    try:
        for _ in range(50):
            for value in (counts.one.cpu(), *counts.state_dict().values()):
                assert torch.all(value == value[0])
                assert value[0] >= last
                last = float(value[0])
            one, other = tw.get([counts.one, counts.other])
            assert torch.equal(one, other)
    finally:
        stop.set()
        thread.join()
    assert failures == []


# ---- other processes


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((4,), float(index))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_data_loader_has_workers(mesh, method):
    double = tw.program(lambda x: (x * 2).sum(), mesh=mesh)
    for _ in range(3 if method == "fork" else 1):
        loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2, multiprocessing_context=method)
        assert [double(x).item() for x in loader] == [48.0, 176.0]


def _touch(array, program, answers):
    for touch in (array.cpu, lambda: array + 1, lambda: array.add_(1), lambda: program(torch.ones(2))):
        try:
            touch()
            answers.put("no error")
        except UserError as error:
            answers.put(str(error))


def test_a_forked_process_is_told_that_arrays_are_not_its_own(mesh):
    double = tw.program(lambda x: x * 2, mesh=mesh)
    array = double(torch.ones(2))
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_touch, args=(array, double, answers))
    child.start()
    for _ in range(4):
        assert f"belongs to process {os.getpid()}" in (answer := answers.get())
        assert "Read what they need with .cpu() before they are forked" in answer
    child.join(20)
    assert child.exitcode == 0
    assert array.tolist() == [2.0, 2.0]
    assert double(array).tolist() == [4.0, 4.0]


def _begin(answers):
    tw.shutdown()
    try:
        tw.init(islands=1, devices_per_island=1)
    except UserError as error:
        answers.put(str(error))


def test_a_forked_process_has_no_session_of_its_own(mesh):
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_begin, args=(answers,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert f"forked from process {os.getpid()}" in answers.get()
    assert tw.program(lambda x: x * 2, mesh=mesh)(torch.ones(2)).tolist() == [2.0, 2.0]


def test_a_session_does_not_show_its_token(mesh):
    session = _current()
    token, identity = (value for _, value in session.connections.manager.metadata)
    secret = identity.rpartition(":")[2]
    assert token
    assert secret
    assert token not in repr(session)
    assert secret not in repr(session)


def test_cpu_takes_a_memory_format_by_position_and_a_timeout_by_name(mesh):
    value = torch.randn(2, 3, 4, 4)
    array = tw.distribute_tensor(value, mesh, None)
    found = array.cpu(torch.channels_last)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, value)
    assert torch.equal(array.cpu(timeout=timedelta(seconds=60)), value)
    with pytest.raises(TypeError, match=r"a timeout is given by name: cpu\(timeout=...\)"):
        array.cpu(timedelta(seconds=60))
