"""The main job on real processes: what it computes, what it sends, what it keeps."""

import asyncio
import copy
import gc
import logging
import re
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from recipes.models.gpt import GPT, GPTConfig
from torchways import api
from torchways.errors import (
    CaptureError,
    DeadlineExceeded,
    PlacementError,
    ResourceExhausted,
    ShapeError,
)

TINY = GPTConfig()


def make_step(model, optimizer):
    def train_step(x, y):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss, norm

    return train_step


def batches(num, batch_size=16, length=128):
    text = torch.tensor(bytearray(Path(torch.__file__).read_bytes()), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        starts = torch.randint(0, len(text) - length - 1, (batch_size,), generator=generator)
        rows = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
        yield rows[:, :-1], rows[:, 1:]


def train(model, num_steps, wrap=lambda step: step, **sizes):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    step = wrap(make_step(model, optimizer))
    losses = []
    for x, y in batches(num_steps, **sizes):
        losses.append(step(x, y)[0])
        schedule.step()
    return torch.tensor([loss.item() for loss in losses]), step


def split(model, meshes):
    return tw.pipeline(model, split_spec={"layers.2": tw.SplitPoint.BEGINNING}, meshes=meshes)


#: Of the batches in a quick test, where eager PyTorch's steps and the executors' would take most of the time.
SMALL = {"batch_size": 8, "length": 32}


@pytest.mark.parametrize(("num_steps", "sizes"), [(12, SMALL), pytest.param(50, {}, marks=pytest.mark.slow)])
def test_steps_agree_with_eager(cluster, meshes, num_steps, sizes):
    torch.manual_seed(0)
    eager = GPT(TINY)
    ours = split(copy.deepcopy(eager), meshes)
    before = api._current().num_messages()
    losses, step = train(ours, num_steps, tw.program, **sizes)
    after = api._current().num_messages()
    expected, _ = train(eager, num_steps, **sizes)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    assert losses[-1] < losses[0] - num_steps / 50
    assert step.num_traces == 1
    # One message an island a run, whatever the number of nodes.
    for island in after:
        runs = [counts[island].get("run_program", 0) if island in counts else 0 for counts in (before, after)]
        assert runs[1] - runs[0] == num_steps
    # Nothing ran on the host, and nothing is left of the runs but state and losses.
    for status in tw.executor_status():
        assert status.fallback_counters == {}
        assert status.num_runs_in_flight == 0
    state = ours.state_dict()
    for name, value in eager.state_dict().items():
        assert state[name].shape == value.shape
    text = str(step)
    assert " transfer @0 -> @1" in text
    assert " transfer @1 -> @0" in text


def test_what_was_compiled_once_serves_other_programs(cluster, meshes):
    torch.manual_seed(0)
    compiled = []
    for _ in range(2):
        model = tw.function(nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 1)), mesh=meshes[0])
        optimizer = torch.optim.AdamW(model.parameters())

        @tw.program
        def step(x, model=model, optimizer=optimizer):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        step(torch.ones(4, 6)).item()
        del step, model, optimizer
        gc.collect()
        compiled.append(sum(status.num_compiled for status in tw.executor_status()))
    assert compiled[1] == compiled[0]


def test_a_first_run_says_what_it_took(cluster, meshes, caplog):
    logger = logging.getLogger("torchways")
    propagates, level = logger.propagate, logger.level
    logger.propagate = True
    logger.setLevel(logging.INFO)
    try:
        tw.function(lambda x: x * 3, mesh=meshes[0])(torch.ones(4)).cpu()
        deadline = time.monotonic() + 10
        while "first run" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        logger.propagate = propagates
        logger.setLevel(level)
    assert re.search(r"<lambda>: traced \d+\.\d s, compiled \d+\.\d s \(1 function\), first run \d+\.\d s", caplog.text)


@pytest.mark.slow  # what is left behind, test_leaks.py counts
def test_memory_is_flat(cluster, meshes):
    """Parameters and optimizer state are donated: step 80 needs no more memory than step 20."""
    model = split(GPT(TINY), meshes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = tw.program(make_step(model, optimizer))
    resident = {}
    for number, (x, y) in enumerate(batches(80, batch_size=4, length=32), start=1):
        loss, _ = step(x, y)
        if number in (20, 80):
            loss.item()
            resident[number] = {
                name: psutil.Process(pid).memory_info().rss
                for name, pid in tw.cluster_info().processes
                if name.startswith("executor")
            }
    assert resident[20]
    for name, before in resident[20].items():
        assert resident[80][name] < 1.05 * before, name


def test_arrays_are_futures(cluster, meshes):
    double = tw.function(lambda x: x * 2, mesh=meshes[0])
    y = double(torch.arange(4.0).reshape(4, 1))
    assert repr(y) == "tw.Array(fp32[4,1][S(0)] on mesh('dp'=2))"
    assert y.mesh is meshes[0]
    assert y.sharding == ("S(0)",)
    assert y.tolist() == [[0], [2], [4], [6]]
    assert y.done()
    assert y.numpy().sum() == 12

    async def read():
        return await y

    assert asyncio.run(read()).tolist() == y.tolist()
    assert (y + 1).tolist() == [[1], [3], [5], [7]]  # read to the host
    y[1:] += 1  # changed on the host, from where it goes back to its slice
    assert double(y).tolist() == [[0], [6], [10], [14]]
    with pytest.raises(RuntimeError, match="Tensor with 4 elements"):
        y.item()


def slow_product(x):
    for _ in range(60):
        x = x @ x / 100
    return x


def test_a_timed_out_read_does_not_consume_the_future(cluster, meshes):
    y = tw.function(slow_product, mesh=meshes[0])(torch.ones(1000, 1000))
    with pytest.raises(DeadlineExceeded):
        y.cpu(timeout=timedelta(seconds=0.001))
    assert y.shape == y.cpu().shape


def test_many_arrays_are_read_at_once(cluster, meshes):
    slow = tw.function(slow_product, mesh=meshes[0])
    arrays = {"here": slow(torch.ones(1000, 1000)), "there": tw.distribute_tensor(torch.ones(2), meshes[1])}
    with pytest.raises(DeadlineExceeded):
        tw.get(arrays, timeout=timedelta(seconds=0.001))
    read = tw.get({**arrays, "more": [3, torch.ones(1)]}, timeout=timedelta(seconds=60))
    assert type(read["here"]) is torch.Tensor
    assert torch.equal(read["here"], arrays["here"].cpu())
    assert read["there"].tolist() == [1, 1]
    assert read["more"] == [3, torch.ones(1)]


def test_functions_that_nobody_keeps_are_forgotten(cluster, meshes):
    sent = [counts.get("forget_program", 0) for counts in api._current().num_messages().values()]
    results = [tw.function(lambda x, n=n: x * n, mesh=meshes[0])(torch.ones(2)) for n in range(5)]
    gc.collect()
    assert [result.tolist() for result in results] == [[n, n] for n in range(5)]
    after = [counts.get("forget_program", 0) for counts in api._current().num_messages().values()]
    assert sum(after) - sum(sent) >= 5


def test_a_program_is_registered_before_its_first_run_though_the_loop_is_late(cluster, meshes):
    add_one = tw.function(lambda x: x + 1, mesh=meshes[0])
    y = add_one(torch.zeros(2))
    api._current().connections.loop.call(time.sleep, 1.0)  # as when tracing keeps the loop's thread from running
    y = add_one(y)
    y = tw.function(lambda x: x * 3, mesh=meshes[0])(y)
    assert y.cpu(timeout=timedelta(seconds=60)).tolist() == [6, 6]


def test_long_chains_of_calls_release_what_they_used_in_order(cluster, meshes):
    add_one = tw.function(lambda x: x + 1, mesh=meshes[0])
    for _ in range(5):
        y = tw.distribute_tensor(torch.zeros(2), meshes[0], ["S(0)"])
        for _ in range(150):
            y = add_one(y)
        assert y.tolist() == [150, 150]
    assert all(status.num_buffers < 500 for status in tw.executor_status())


def test_distributed_tensors(cluster, meshes):
    from torch.distributed.tensor import Replicate, Shard

    whole = torch.randn(4, 6)
    for placements, text in (([Shard(1)], ("S(1)",)), ([Replicate()], ("R",)), (["S(0)"], ("S(0)",))):
        array = tw.distribute_tensor(whole, meshes[1], placements)
        assert array.sharding == text
        assert torch.equal(array.cpu(), whole)
    with pytest.raises(PlacementError, match=r"axis 'dp' has size 2 but dimension 0 has 3"):
        tw.distribute_tensor(torch.ones(3), meshes[1], [Shard(0)])
    with pytest.raises(PlacementError, match="no dimension 2"):
        tw.distribute_tensor(whole, meshes[1], [Shard(2)])


def test_an_array_of_another_slice_is_transferred(cluster, meshes):
    first = tw.function(lambda x: x + 1, mesh=meshes[0])
    second = tw.function(lambda x: x.sum(0), mesh=meshes[1])
    assert second(first(torch.ones(6, 2))).tolist() == [12, 12]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.bool, torch.bfloat16, torch.uint8])
def test_dtypes_survive_the_way_there_and_back(cluster, meshes, dtype):
    value = torch.tensor([[0, 1], [2, 3]]).to(dtype)
    for host in (value, value[0, 1], value[:0]):
        array = tw.distribute_tensor(host, meshes[0])
        assert array.cpu().dtype == dtype
        assert torch.equal(array.cpu(), host)
    assert torch.equal(tw.function(lambda x: x.clone(), mesh=meshes[0])(value).cpu(), value)


def test_wrong_shape_and_dtype_name_the_users_line(cluster, meshes):
    model = tw.function(nn.Linear(4, 2), mesh=meshes[0])
    with pytest.raises(CaptureError, match=r"\[2, 5\] X \[4, 2\][\s\S]*test_training\.py:\d+"):
        model(torch.ones(2, 5))
    with pytest.raises(ShapeError, match=r"one dtype, not float32 and int64 and float32, at test_training\.py:\d+"):
        model(torch.ones(2, 4, dtype=torch.int64))
    embedding = tw.function(nn.Embedding(4, 2), mesh=meshes[0])
    with pytest.raises(ShapeError, match=r"indices of dtype int64 or int32, not float32, at test_training\.py:\d+"):
        embedding(torch.ones(2, 3))
    assert model(torch.ones(2, 4)).shape == (2, 2)


def test_more_devices_than_exist(cluster):
    with pytest.raises(
        ResourceExhausted, match=r"needs 4 devices of one island; island 0 has 2 .* free., island 1 has 2"
    ):
        tw.init_device_mesh((4,), mesh_dim_names=("dp",))
    with pytest.raises(PlacementError, match=r"there is no island 7"):
        tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=7)
    with pytest.raises(PlacementError, match=r"one length"):
        tw.init_device_mesh((2,), mesh_dim_names=("dp", "tp"))
    with pytest.raises(PlacementError, match=r"axis 'dp' has size 0"):
        tw.init_device_mesh((0,), mesh_dim_names=("dp",))


def test_pipeline_bad_split(cluster, meshes):
    with pytest.raises(PlacementError, match=r"no submodule 'layers\.9'"):
        tw.pipeline(GPT(TINY), split_spec={"layers.9": tw.SplitPoint.BEGINNING}, meshes=meshes)
    with pytest.raises(PlacementError, match="give one mesh a stage"):
        tw.pipeline(GPT(TINY), split_spec={"layers.2": tw.SplitPoint.BEGINNING}, meshes=meshes[:1])


def test_decorated_module_class(cluster, meshes):
    @tw.function(mesh=meshes[0])
    class Scale(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x):
            return x * self.factor

    scale = Scale(3.0)
    assert isinstance(scale, nn.Module)
    assert scale(torch.ones(2)).tolist() == [3, 3]
    assert scale.state_dict()["factor"].item() == 3
    optimizer = torch.optim.SGD(scale.parameters(), lr=0.5)

    @tw.program
    def step(x):
        loss = scale(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    assert [step(torch.ones(2)).item() for _ in range(3)] == [6, 4, 2]
    assert scale.state_dict()["factor"].item() == 0


def test_profile_has_a_row_for_each_device(cluster, meshes, tmp_path):
    import json

    double = tw.function(lambda x: x * 2, mesh=meshes[0])
    double(torch.ones(2, 2)).cpu()
    with tw.profile(tmp_path / "trace.json"):
        double(torch.ones(2, 2))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"device 0", "device 1", "dispatch"} <= rows
    runs = [event for event in events if event["ph"] == "X" and "<lambda>" in event["name"]]
    assert len({event["args"]["run_id"] for event in runs}) == 1
    assert sorted(event["cat"] for event in runs) == ["admitted", "compute", "compute", "dispatch", "held"]
