"""`tw.data_loader` on real clusters: the batches of PyTorch's own DataLoader, positions, and what goes wrong."""

import contextlib
import gc
import os
import signal
import time

import psutil
import pytest
import torch
import torch.utils._pytree as pytree
from torch.distributed.tensor import Replicate, Shard
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import torchways as tw
from benchmarks.input_pipeline import controller_bytes
from tests import datasets
from tests.cluster.conftest import status_of, wait_gone
from tests.unit.data.test_batches import REFUSED
from torchways.api import _current as current_session
from torchways.controller import data_loader
from torchways.errors import (
    ConfigError,
    DataError,
    DataProcessLost,
    PlacementError,
    ShapeError,
    UserError,
)

ROWS = "tests.datasets:Rows"


@contextlib.contextmanager
def loader(name, mesh, *args, **options):
    made = tw.data_loader(f"tests.datasets:{name}", mesh, args=args, **options)
    try:
        yield made
    finally:
        made.close()


def values(batch):
    return pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, tw.Array) else leaf, batch)


def same(ours, theirs):
    ours, our_spec = pytree.tree_flatten(values(ours))
    theirs, their_spec = pytree.tree_flatten(values(theirs))
    # A named tuple is made anew, with the same name and fields.
    assert str(our_spec).replace("torchways.data.trees.", "tests.datasets.") == str(their_spec)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other
    return True


def take_all(iterator):
    for _ in iterator:
        pass


def data_processes():
    return {name: pid for name, pid in tw.cluster_info().processes if name.startswith("data process")}


def plain(dataset, *, epoch=0, shuffle=False, seed=0, **options):
    """The batches of PyTorch's loader, in the order that it has with a DistributedSampler."""
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
    sampler.set_epoch(epoch)
    return list(DataLoader(dataset, sampler=sampler, **options))


def test_batches_are_those_of_a_plain_loader_on_two_slices_at_once(meshes):
    """Shuffled epochs on one slice, with workers, while another reads in order, in its data process itself."""
    dataset = datasets.Rows(22)
    with (
        loader("Rows", meshes[0], 22, batch_size=4, shuffle=True, seed=7, num_workers=2, drop_last=True) as first,
        loader("Rows", meshes[1], 22, batch_size=4) as second,
    ):
        assert (len(first), len(second)) == (5, 6)
        for epoch in range(2):
            expected = plain(dataset, epoch=epoch, shuffle=True, seed=7, batch_size=4, drop_last=True)
            in_order = plain(dataset, batch_size=4)
            pairs = list(zip(first, second, strict=False))
            assert len(pairs) == 5
            for (ours, other), theirs, other_theirs in zip(pairs, expected, in_order, strict=False):
                same(ours, theirs)
                same(other, other_theirs)
                assert ours["x"]._buffer.placements == ("S(0)",)
                assert ours["x"].mesh is meshes[0]
                assert other["x"].mesh is meshes[1]


def test_a_program_takes_batches_and_the_controllers_bytes_do_not_grow_with_them(meshes):
    step = tw.program(lambda batch: batch.x[:, 0].to(torch.float32).sum(), mesh=meshes[0])
    bytes_of = {}
    for width in (1 << 10, 1 << 20):
        with loader("Bytes", meshes[0], 40, width, batch_size=4, num_workers=1) as batches:
            iterator = iter(batches)
            for number in range(2):
                assert step(next(iterator)).item() == sum(range(4 * number, 4 * number + 4))
            before = controller_bytes()
            found = [step(batch) for batch in iterator]
            assert [value.item() for value in found] == [sum(range(4 * n, 4 * n + 4)) for n in range(2, 10)]
            bytes_of[width] = controller_bytes() - before
    # Reading the sums is part of it. A batch has 4 MB, or 4 kB.
    assert bytes_of[1 << 20] < 2 * bytes_of[1 << 10] < 100_000


def test_batches_of_any_structure_and_dtype(meshes):
    with loader("Bytes", meshes[0], 12, 40_000, batch_size=4, num_workers=1) as batches:
        for ours, theirs in zip(batches, plain(datasets.Bytes(12, 40_000), batch_size=4), strict=True):
            same(ours, theirs)
            assert ours._fields == ("x", "y")
    made = tw.data_loader(
        "tests.datasets:make_rows",
        meshes[1],
        kwargs={"num_rows": 6},
        batch_size=2,
        collate_fn="tests.datasets:add_up",
        prefetch=0,
    )
    for ours, theirs in zip(made, plain(datasets.Rows(6), batch_size=2, collate_fn=datasets.add_up), strict=True):
        same(ours, theirs)
    made.close()


def test_placements_say_how_batches_are_split(meshes):
    options = {"batch_size": 3, "drop_last": True, "placements": {"": [Replicate()], "x": [Shard(1)]}}
    with loader("Rows", meshes[0], 7, **options) as batches:
        for ours, theirs in zip(batches, plain(datasets.Rows(7), batch_size=3, drop_last=True), strict=True):
            same(ours, theirs)
            assert ours["x"]._buffer.placements == ("S(1)",)
            assert ours["label"]._buffer.placements == ("R",)
    with (
        loader("Rows", meshes[0], 4, batch_size=2, placements=(None, "dp")) as batches,
        pytest.raises(
            PlacementError,
            match=r"batch 0 of the data loader, 'label': the partition spec .* has 2 entries for shape \(2,\)",
        ),
    ):
        next(iter(batches))
    with (
        loader("Rows", meshes[0], 5, batch_size=3) as batches,
        pytest.raises(
            PlacementError,
            match=r"axis 'dp' has size 2 but dimension 0 has 3 \(batch 0 of the data loader, 'x'\); pad it",
        ),
    ):
        next(iter(batches))
    with pytest.raises(PlacementError, match=r"2 placements .* for the 1 axes of mesh"):
        tw.data_loader(ROWS, meshes[0], args=[4], placements=[Shard(0), Shard(0)])
    with pytest.raises(PlacementError, match="count dimensions from the first"):
        tw.data_loader(ROWS, meshes[0], args=[4], placements=[Shard(-1)])


def test_slices_share_the_rows_of_each_batch(meshes):
    with loader("Rows", meshes, 20, batch_size=8, shuffle=True, drop_last=True) as batches:
        for ours, theirs in zip(
            batches, plain(datasets.Rows(20), shuffle=True, batch_size=8, drop_last=True), strict=True
        ):
            assert [part["x"].mesh for part in ours] == list(meshes)
            assert torch.equal(torch.cat([part["x"].cpu() for part in ours]), theirs["x"])
            assert ours[0]["name"] + ours[1]["name"] == theirs["name"]
    with loader("Rows", meshes, 13, batch_size=8) as batches:
        iterator = iter(batches)
        next(iterator)
        with pytest.raises(
            ShapeError, match="batch 1 of epoch 0 has 5 rows, which cannot be split evenly over 2 slices"
        ):
            next(iterator)
    with pytest.raises(ConfigError, match="batch_size=5 cannot be split evenly over 2 slices"):
        tw.data_loader(ROWS, meshes, args=[4], batch_size=5)
    with pytest.raises(ConfigError, match="IterableDataset, of which no part can be read alone"):
        tw.data_loader("tests.datasets:Counting", meshes, args=[4], batch_size=2)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])  # each has 0 and 2
def test_after_load_the_next_batch_is_the_one_that_would_have_come(meshes, num_workers):
    """Shuffled, with random numbers in `__getitem__`, in the middle and at the end of an epoch."""
    options = {"batch_size": 4, "shuffle": True, "seed": 3}
    with loader("Noisy", meshes[0], 20, num_workers=num_workers, **options) as batches:
        states, expected = [], []
        for _ in range(2):
            for batch in batches:
                expected.append(values(batch))
                states.append(batches.state_dict())  # others are on the slice already
    assert [(state["epoch"], state["batch"]) for state in states[:6]] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (0, 4),
        (0, 5),
        (1, 1),
    ]
    assert len({tuple(batch[0].tolist()) for batch in expected}) == 10
    with loader("Noisy", meshes[1], 20, num_workers=2 - num_workers, **options) as again:
        for taken in (2, 5, 7):
            again.load_state_dict(states[taken - 1])
            left = 5 - taken % 5 if taken % 5 else 5
            for ours, theirs in zip(again, expected[taken : taken + left], strict=True):
                same(ours, theirs)
        again.load_state_dict(states[1])
        again.set_epoch(0)  # what a loop over epochs says anyway: the position stays
        same(next(iter(again)), expected[2])
        again.set_epoch(1)
        same(next(iter(again)), expected[5])
        with pytest.raises(
            ConfigError, match="the position is that of a data loader with seed=4, but this one has seed=3"
        ):
            again.load_state_dict({**states[0], "seed": 4})
        with pytest.raises(ConfigError, match=r"no data loader's state_dict: it has no .*epoch"):
            again.load_state_dict({"batch_size": 4})
        with pytest.raises(ConfigError, match="set_epoch takes a whole number"):
            again.set_epoch(-1)


@pytest.mark.parametrize(("num_workers", "keeps_state"), [(0, True), (2, True), (2, False)])
def test_positions_in_iterable_datasets(meshes, num_workers, keeps_state):
    options = {"batch_size": 2, "num_workers": num_workers}
    with loader("Counting", meshes[0], 12, keeps_state, **options) as batches:
        with pytest.raises(TypeError, match=r"number of batches of dataset 'tests.datasets:Counting' is not known"):
            len(batches)
        expected, states = [], []
        for _ in range(2):
            for batch in batches:
                expected.append(values(batch))
                states.append(batches.state_dict())
    assert len(expected) == 12
    theirs = DataLoader(datasets.Counting(12), **options)
    assert [batch.tolist() for batch in expected[:6]] == [batch.tolist() for batch in theirs]
    assert expected[6].tolist() == [1000 + number for number in expected[0].tolist()]
    with loader("Counting", meshes[0], 12, keeps_state, **options) as again:
        for taken in (2, 6):  # the second is behind the last batch: the next epoch's come
            again.load_state_dict(states[taken - 1])
            end = 6 if taken < 6 else 12
            assert [values(b).tolist() for b in again] == [b.tolist() for b in expected[taken:end]]
    with loader("Counting", meshes[0], 12, keeps_state, batch_size=2, num_workers=num_workers + 1) as other:
        with pytest.raises(
            ConfigError, match=rf"num_workers={num_workers}, but this one has num_workers={num_workers + 1}"
        ):
            other.load_state_dict(states[1])
        other.load_state_dict({**states[1], "state": None})  # one of a whole dataset may have any number
        with pytest.raises(ConfigError, match="no data loader's state_dict: None"):
            other.load_state_dict(None)


def test_a_state_that_cannot_be_written_down_fails_where_it_is_asked_for(meshes):
    with loader("BadState", meshes[0], 8, batch_size=2) as batches:
        assert [values(batch).tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        next(iter(batches))
        with pytest.raises(DataError, match=r"the position in dataset .* is not known: DataError: .* has a object at"):
            batches.state_dict()
    with loader("BadState", meshes[0], 8, True, batch_size=2) as batches:
        next(iter(batches))
        with pytest.raises(DataError, match=r"its state has \d+,\d+ bytes of JSON, but at most 65,536 are possible"):
            batches.state_dict()


@pytest.mark.parametrize(
    "refused",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("import", "raises", "shape"))) for name in REFUSED],
)
def test_what_cannot_be_made_says_why(meshes, refused):
    """The reasons come from a data process; tests/unit/data/test_batches.py has all of them."""
    error, match, name, args, options = REFUSED[refused]
    with pytest.raises(error, match=match) as caught:
        tw.data_loader(name, meshes[0], args=args, **options)
    if refused == "import":
        assert "Traceback (most recent call last)" in caught.value.remote_traceback
    if refused == "raises":
        assert "in __init__" in caught.value.remote_traceback
        assert "in __init__" in str(caught.value)
    assert wait_gone(data_processes().values()) == set()


def test_a_row_that_cannot_be_read_is_reported_with_its_traceback_and_number(meshes):
    for num_workers in (0, 2):
        with loader("Failing", meshes[0], 20, 9, "raise", batch_size=4, num_workers=num_workers) as batches:
            iterator = iter(batches)
            assert values(next(iterator))["label"].tolist() == [0, 1, 2, 3]
            next(iterator)
            for _ in range(2):  # it stays so
                with pytest.raises(DataError, match=r"batch 2 of epoch 0 cannot be read: ValueError") as caught:
                    next(iterator)
            assert "ValueError: row 9 is broken while reading item 9 of the dataset" in str(caught.value)
            assert 'raise ValueError(f"row {index} is broken")' in caught.value.remote_traceback
            assert values(next(iter(batches)))["label"].tolist() == [0, 1, 2, 3]  # the process lives
    with (
        loader("Failing", meshes[0], 8, 1, "stop", batch_size=4) as batches,
        pytest.raises(DataError, match="item 1 of the dataset raised StopIteration"),
    ):
        next(iter(batches))
    with (
        loader("Failing", meshes[0], 8, 0, "strange", batch_size=None) as batches,
        pytest.raises(DataError, match=r"the batch has a object at \['x'\]: a batch consists of tensors"),
    ):
        next(iter(batches))
    for how, match in [
        ("talk", r"batch 0 has 2,\d+,\d+ bytes of strings, numbers and keys, .* but at most 1,048,576 are possible"),
        ("many", "batch 0 has 300 tensors, but at most 256 are possible"),
    ]:
        with (
            loader("Failing", meshes[0], 8, 0, how, batch_size=None) as batches,
            pytest.raises(DataError, match=match),
        ):
            next(iter(batches))


def test_a_worker_that_is_killed_is_reported_and_none_is_left(meshes):
    with loader("Failing", meshes[0], 40, 9, "kill", batch_size=4, num_workers=1, prefetch_factor=1) as batches:
        iterator = iter(batches)
        with pytest.raises(DataError, match=r"DataLoader worker \(pid[^)]*\) .*(killed|exited)"):
            take_all(iterator)
        [pid] = data_processes().values()
    assert wait_gone([pid]) == set()


def test_a_data_process_that_is_killed_takes_its_workers_along(meshes):
    with loader("Pids", meshes[0], 4000, batch_size=2, num_workers=2) as batches:
        iterator = iter(batches)
        pids = {values(next(iterator)).tolist()[0] for _ in range(4)}
        [pid] = data_processes().values()
        assert len(pids) == 2
        assert pids == {child.pid for child in psutil.Process(pid).children()}
        assert len(tw.cluster_info().processes) == len(set(tw.cluster_info().processes))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(
            DataProcessLost, match=r"signal 9 \(SIGKILL\)[\s\S]*Make the loader anew and load its position"
        ):
            take_all(iterator)
        state = batches.state_dict()
        assert wait_gone({pid, *pids}) == set()
        assert not any(psutil.pid_exists(worker) for worker in pids)  # the node agent has waited for them
        assert data_processes() == {}
    with loader("Pids", meshes[0], 4000, batch_size=2, num_workers=2) as again:
        again.load_state_dict(state)
        assert next(iter(again)).shape == (2,)


def test_iterators_loaders_and_slices_that_are_over_say_so(meshes):
    mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=0)
    batches = tw.data_loader(ROWS, mesh, args=[8], batch_size=2)
    old, new = iter(batches), None
    next(old)
    new = iter(batches)
    with pytest.raises(UserError, match="another iter"):
        next(old)
    assert len(list(new)) == 4
    assert list(new) == []
    kept = next(iter(batches))
    iterator = iter(batches)
    batches.close()
    batches.close()
    with pytest.raises(UserError, match=r"close\(\) came after it"):
        next(iterator)
    with pytest.raises(UserError, match="this data loader is closed"):
        iter(batches)
    assert kept["label"].tolist() == [0, 1]
    batches = tw.data_loader(ROWS, mesh, args=[8], batch_size=2)
    iterator = iter(batches)
    next(iterator)
    [pid] = data_processes().values()
    mesh.close()
    assert wait_gone([pid]) == set()
    with pytest.raises(PlacementError, match="closed"):
        next(iterator)
    batches.close()


def test_a_loader_that_nobody_has_any_more_ends_its_process(meshes):
    batches = tw.data_loader(ROWS, meshes[0], args=[8], batch_size=2)
    next(iter(batches))
    [pid] = data_processes().values()
    del batches
    assert wait_gone([pid]) == set()


def test_batches_that_are_not_taken_are_given_back(meshes):
    with loader("Rows", meshes[0], 400, batch_size=2, prefetch=4) as batches:
        for _ in range(3):
            next(iter(batches))
        for number, batch in enumerate(batches):
            assert batch["x"].shape == (2, 4)
            if number == 20:
                break
        del batch
    gc.collect()  # of the errors of other tests, whose frames have arrays
    deadline = time.monotonic() + 20
    while (left := status_of(meshes[0]).num_buffers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == 0


def test_no_more_than_the_prefetched_batches_wait_on_the_slice(meshes):
    gc.collect()  # as above
    with loader("Rows", meshes[0], 400, batch_size=2, prefetch=3) as batches:
        iterator = iter(batches)
        for taken in range(1, 4):
            kept = next(iterator)
            deadline = time.monotonic() + 20
            while (found := status_of(meshes[0]).num_buffers) != 8 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert found == 8, taken  # two tensors of this batch, and of three more
        time.sleep(0.2)
        assert status_of(meshes[0]).num_buffers == 8
        assert kept["label"].tolist() == [4, 5]


def test_the_controller_does_not_run_far_ahead_of_the_slice(meshes, monkeypatch):
    monkeypatch.setattr(data_loader, "_BYTES_IN_USE", 0)

    @tw.program(mesh=meshes[0])
    def slow(x):
        for _ in range(60):
            x = (x @ x).softmax(-1)
        return x.sum()

    session = current_session()
    options = {"batch_size": 256, "placements": [Replicate()], "num_workers": 1}
    with loader("Rows", meshes[0], 256 * 10, 256, **options) as batches:
        iterator = iter(batches)
        slow(next(iterator)["x"]).item()
        in_flight, sums = [], []
        for batch in iterator:
            in_flight.append(len(session.runs._runs))
            sums.append(slow(batch["x"]))
        assert len(sums) == 9
        assert 1 <= max(in_flight) <= 2
        assert [round(value.item()) for value in sums] == [256] * 9


def test_a_slice_that_moves_takes_its_loader_along(meshes):
    mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=0)
    with loader("Rows", mesh, 12, batch_size=2, shuffle=True) as batches:
        iterator = iter(batches)
        first = next(iterator)
        mesh.remap(island=1)
        rest = [next(iterator) for _ in range(5)]
        for ours, theirs in zip([first, *rest], plain(datasets.Rows(12), shuffle=True, batch_size=2), strict=True):
            same(ours, theirs)
        assert next(iterator, None) is None
    mesh.close()


def test_options_that_cannot_be(meshes):
    for match, options in [
        ("batch_size must be a whole number of at least 1, not 0", {"batch_size": 0}),
        ("num_workers must be a whole number of at least 0, not -1", {"num_workers": -1}),
        ("prefetch_factor must be a whole number of at least 1", {"prefetch_factor": 0}),
        ("prefetch must be a whole number of at least 0", {"prefetch": -1}),
        ("seed must be a whole number from 0", {"seed": "x"}),
        ("drop_last=True needs a batch_size", {"drop_last": True, "batch_size": None}),
        ("timeout must be a number of seconds", {"timeout": -1}),
        (r"kwargs\['rows'\] is a Tensor, which does not cross processes", {"kwargs": {"rows": torch.ones(2)}}),
        (r"args\[0\] has the key 3, which is no string", {"args": [{3: 4}]}),
        ("collate_fn must be an import path such as 'package.module:name', not 'collate'", {"collate_fn": "collate"}),
    ]:
        with pytest.raises(ConfigError, match=match):
            tw.data_loader(ROWS, meshes[0], **{"args": [4], **options})
    with pytest.raises(ConfigError, match=r"must be an import path such as 'tests.datasets:Rows', not <class"):
        tw.data_loader(datasets.Rows, meshes[0])
    with pytest.raises(ConfigError, match="names the script itself, which other processes cannot import"):
        tw.data_loader("__main__:Rows", meshes[0])
    with pytest.raises(PlacementError, match="the list is empty"):
        tw.data_loader(ROWS, [])


def test_eager_mode_yields_the_same_batches_as_tensors(meshes, monkeypatch):
    with loader("Noisy", meshes, 20, batch_size=4, shuffle=True, seed=3, num_workers=1) as batches:
        expected = [values(batch) for batch in batches]
    monkeypatch.setenv("TORCHWAYS_EAGER", "1")
    slices = [tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    with loader("Noisy", slices, 20, batch_size=4, shuffle=True, seed=3) as eager:
        found = list(eager)
        assert not any(isinstance(leaf, tw.Array) for leaf in pytree.tree_leaves(found))
        same(found, expected)
        assert torch.equal(torch.rand(3), drawn)  # the user's own random numbers are as they were
        iterator = iter(eager)
        second = [next(iterator) for _ in range(2)][1]
        eager.load_state_dict({**eager.state_dict(), "batch": 1})
        same(next(iter(eager)), second)
    with loader("Failing", slices[0], 8, 5, "raise", batch_size=4) as eager:
        iterator = iter(eager)
        next(iterator)
        for _ in range(2):  # it stays so
            with pytest.raises(DataError, match="batch 1 of epoch 0 cannot be read: ValueError: row 5 is broken while"):
                next(iterator)
