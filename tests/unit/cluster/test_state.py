"""The resource manager's core: reservations, releases, lost processes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sizes import sizes
from torchways.cluster import state as core
from torchways.errors import ClusterLost, InternalError, PlacementError, ResourceExhausted, SessionClosed


def with_clients():
    cluster = core.ClusterState()
    assert [cluster.attach(f"client {number}") for number in (1, 2, 3)] == [1, 2, 3]
    return cluster


def make_cluster(*devices, platform="cpu"):
    cluster = with_clients()
    joined = core.NodeJoined(node_id=0, host="here", platform=platform, devices_per_island=devices)
    commands = cluster.handle(joined)
    assert [c.name for c in commands] == [f"scheduler i{i}" for i in range(len(devices))]
    for island in cluster.islands:
        cluster.handle(core.SchedulerReady(island_id=island, address=f"address {island}", pid=1))
    return cluster


def reserve(cluster, *shape, client=1, island=None):
    names = ("dp", "tp", "pp")[: len(shape)]
    return cluster.reserve(client, shape, names, island)[0]


def process_of(item):
    return core.process_name(item.executor_ids[0])


def make_ready(cluster, item):
    for executor_id in item.executor_ids:
        if executor_id not in item.device_set.executors:
            cluster.handle(core.ExecutorReady(executor_id=executor_id, info="info"))
    assert item.is_connecting
    assert cluster.handle(core.SliceConnected(slice_id=item.slice_id)) == [core.SettleSlice(slice_id=item.slice_id)]
    assert item.state == "ready"


def test_free_devices_come_first_then_the_least_used():
    cluster = make_cluster(4)
    assert reserve(cluster, 2).device_indices == (0, 1)
    assert reserve(cluster, 2).device_indices == (2, 3)
    assert reserve(cluster, 3).device_indices == (0, 1, 2)
    assert reserve(cluster, 1).device_indices == (3,)
    assert cluster.islands[0].load == [2, 2, 2, 2]


def test_slices_of_the_same_devices_share_executors_whatever_their_shape_and_client():
    cluster = make_cluster(2)
    first, commands = cluster.reserve(1, (2,), ("dp",), None)
    assert [type(command) for command in commands] == [core.StartExecutor]
    make_ready(cluster, first)
    second, commands = cluster.reserve(2, (2, 1), ("x", "y"), None)
    assert commands == [core.ConnectSlice(slice=second, scheduler_address="address 0")]
    assert second.device_set is first.device_set
    make_ready(cluster, second)
    commands = cluster.handle(core.ProcessExited(name=process_of(first), reason="signal 9"))
    assert [c.client_id for c in commands if isinstance(c, core.TellLost)] == [1, 2]
    third, commands = cluster.reserve(1, (2,), ("dp",), None)
    assert (third.executor_ids, [type(command) for command in commands]) == (("i0.e2",), [core.StartExecutor])


def test_executors_stay_for_a_while_when_no_slice_is_left():
    cluster = make_cluster(2)
    first = reserve(cluster, 2)
    make_ready(cluster, first)
    released = core.SliceReleased(slice_id=first.slice_id, scheduler_knows=True)
    assert cluster.handle(released) == [core.SettleSlice(slice_id=1), core.WaitIdle(name="i0.e1", period=1)]
    second = reserve(cluster, 2)
    assert second.device_set is first.device_set
    assert cluster.handle(core.IdleOver(name="i0.e1", period=1)) == []
    make_ready(cluster, second)
    cluster.handle(core.SliceReleased(slice_id=second.slice_id))
    assert cluster.handle(core.IdleOver(name="i0.e1", period=1)) == []  # of an earlier time without a slice
    assert cluster.handle(core.IdleOver(name="i0.e1", period=2)) == [
        core.DisconnectExecutor(executor_id="i0.e1", scheduler_address="address 0", reason="it was idle"),
        core.EndProcess(node_id=0, name="executor i0.e1"),
    ]
    assert not cluster.device_sets


def test_a_client_that_is_not_attached_reserves_nothing():
    cluster = make_cluster(2)
    cluster.handle(core.ClientGone(client_id=2))
    for client in (2, 9):
        with pytest.raises(SessionClosed, match=f"client {client} is not attached"):
            reserve(cluster, 1, client=client)


def test_the_freest_island_is_chosen_unless_one_is_asked_for():
    cluster = make_cluster(2, 2)
    assert [reserve(cluster, 2).island_id for _ in range(4)] == [0, 1, 0, 1]
    assert reserve(cluster, 2, island=1).island_id == 1


def test_a_slice_starts_an_executor_on_the_islands_node():
    cluster = make_cluster(2)
    item, commands = cluster.reserve(1, (2,), ("dp",), None)
    assert commands == [
        core.StartExecutor(
            node_id=0,
            name="executor i0.e1",
            device_set=item.device_set,
            executor_id="i0.e1",
            device_indices=(0, 1),
        )
    ]


def test_too_large_a_slice_is_refused_with_what_there_is():
    cluster = make_cluster(2, 2)
    with pytest.raises(ResourceExhausted) as caught:
        reserve(cluster, 2, 2)
    assert str(caught.value) == (
        "a slice ('dp'=2,'tp'=2) needs 4 devices of one island; island 0 has 2 (2 free), island 1 has 2 (2 free). "
        "Ask for a smaller mesh, or start the cluster with more --devices-per-island"
    )
    assert not cluster.slices
    assert cluster.islands[0].load == [0, 0]


def test_a_tpu_device_belongs_to_one_set_at_a_time():
    cluster = make_cluster(4, platform="tpu")
    first = reserve(cluster, 3)
    with pytest.raises(ResourceExhausted, match=r"island 0 has 1 of 4 free: \('dp'=3\) of client 1 has \[0, 1, 2\]"):
        reserve(cluster, 2)
    assert reserve(cluster, 1, 3, client=2).device_set is first.device_set  # two tenants of the same chips
    for item in list(cluster.slices.values()):
        cluster.handle(core.SliceReleased(slice_id=item.slice_id))
    second, commands = cluster.reserve(1, (2,), ("dp",), None)
    assert second.device_indices == (0, 1)
    assert [type(command) for command in commands] == [core.EndProcess, core.StartExecutor]


def test_who_lost_a_tpu_device_gets_it_again_though_others_have_not_closed_their_lost_meshes():
    cluster = make_cluster(2, platform="tpu")
    mine, theirs = reserve(cluster, 2), reserve(cluster, 2, client=2)
    cluster.handle(core.ProcessExited(name=process_of(mine), reason="signal 9"))
    assert (mine.state, theirs.state, cluster.islands[0].load) == ("failed", "failed", [0, 0])
    again, commands = cluster.reserve(1, (1,), ("dp",), None)
    assert (again.device_indices, [type(c) for c in commands]) == ((0,), [core.StartExecutor])
    with pytest.raises(ResourceExhausted, match=r"island 0 has 1 of 2 free: \('dp'=1\) of client 1 has \[0\]\. Close"):
        reserve(cluster, 2, client=2)
    for lost in (mine, theirs):
        cluster.handle(core.SliceReleased(slice_id=lost.slice_id))
    assert cluster.islands[0].load == [1, 0]


@pytest.mark.parametrize(
    ("shape", "names", "island", "text"),
    [
        ((2,), ("dp", "tp"), None, "must be of one length"),
        ((1, 2), ("dp", "dp"), None, "names different"),
        ((), (), None, "not empty"),
        ((0,), ("dp",), None, "size 0"),
        ((1,), ("dp",), 7, r"there is no island 7; the cluster has islands \[0\]"),
    ],
)
def test_nonsense_is_refused(shape, names, island, text):
    with pytest.raises(PlacementError, match=text):
        make_cluster(2).reserve(1, shape, names, island)


def test_a_client_that_is_gone_leaves_nothing():
    cluster = make_cluster(2)
    one, two, other = reserve(cluster, 2, client=1), reserve(cluster, 1, client=1), reserve(cluster, 1, client=2)
    make_ready(cluster, one)
    commands = cluster.handle(core.ClientGone(client_id=1))
    assert {c.name for c in commands if isinstance(c, core.WaitIdle)} == {one.device_set.name, two.device_set.name}
    assert [c.slice for c in commands if isinstance(c, core.DisconnectSlice)] == [one]
    assert {c.slice_id for c in commands if isinstance(c, core.SettleSlice)} == {one.slice_id, two.slice_id}
    assert list(cluster.slices.values()) == [other]
    assert sum(cluster.islands[0].load) == 1


def test_a_dead_executor_fails_its_slice_and_tells_client_and_scheduler():
    cluster = make_cluster(2)
    item = reserve(cluster, 2)
    make_ready(cluster, item)
    commands = cluster.handle(core.ProcessExited(name=process_of(item), reason="signal 9", log_tail="bye"))
    assert commands == [
        core.TellLost(client_id=1, executor_id="i0.e1", slice_id=item.slice_id, reason="signal 9"),
        core.SettleSlice(slice_id=item.slice_id),
        core.DisconnectExecutor(executor_id="i0.e1", scheduler_address="address 0", reason="signal 9"),
    ]
    assert item.failure.kind == "ExecutorLost"
    assert item.failure.message == "executor i0.e1 is lost: signal 9"
    assert cluster.handle(core.SliceConnected(slice_id=item.slice_id)) == []
    assert item.state == "failed"


def test_an_executor_that_never_started_shows_what_it_wrote():
    cluster = make_cluster(2)
    item = reserve(cluster, 2)
    cluster.handle(core.ProcessExited(name=process_of(item), reason="exit code 1", log_tail="ImportError: x\n"))
    assert item.failure.message.endswith("exit code 1; the last lines that it wrote:\nImportError: x")


def test_a_lost_scheduler_or_node_closes_the_cluster():
    cluster = make_cluster(2, 2)
    commands = cluster.handle(core.ProcessExited(name="scheduler i1", reason="signal 9"))
    assert commands == [core.TellClosing(reason="scheduler i1 ended: signal 9")]
    with pytest.raises(ClusterLost, match="the cluster is closing: scheduler i1 ended: signal 9"):
        reserve(cluster, 1)
    assert make_cluster(1).handle(core.NodeLost(node_id=0)) == [core.TellClosing(reason="node agent 0 is gone")]


def test_a_scheduler_that_is_not_reached_closes_the_cluster_if_nothing_has_before():
    cluster = make_cluster(1)
    assert cluster.handle(core.SchedulerCutOff(island_id=7, reason="no island")) == []
    cut_off = core.SchedulerCutOff(island_id=0, reason="it does not answer any more")
    reason = "scheduler i0 cannot be reached: it does not answer any more"
    assert cluster.handle(cut_off) == [core.TellClosing(reason=reason)]
    assert cluster.handle(cut_off) == []


def test_executors_that_are_ready_before_their_scheduler_wait_for_it():
    cluster = with_clients()
    cluster.handle(core.NodeJoined(node_id=0, host="here", platform="cpu", devices_per_island=(1,)))
    item = reserve(cluster, 1)
    assert cluster.handle(core.ExecutorReady(executor_id=item.executor_ids[0], info="info")) == []
    commands = cluster.handle(core.SchedulerReady(island_id=0, address="late", pid=1))
    assert commands == [core.ConnectSlice(slice=item, scheduler_address="late")]


def test_an_impossible_transition_shows_the_slices_history():
    cluster = make_cluster(2)
    item = reserve(cluster, 2)
    make_ready(cluster, item)
    with pytest.raises(InternalError, match=r"slice 1 cannot become ready; it was starting -> ready"):
        cluster.handle(core.SliceConnected(slice_id=item.slice_id))
    with pytest.raises(InternalError, match=r"executor i0\.e1 is ready again"):
        cluster.handle(core.ExecutorReady(executor_id="i0.e1", info="info"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_load_is_always_that_of_the_slices(data):
    cluster = make_cluster(3, 2)
    for _ in range(data.draw(st.integers(1, 20))):
        match data.draw(st.sampled_from(["reserve", "reserve", "release", "gone", "exited"])):
            case "reserve":
                reserve(cluster, data.draw(st.integers(1, 2)), client=data.draw(st.integers(1, 3)))
            case "release" if cluster.slices:
                chosen = data.draw(st.sampled_from(sorted(cluster.slices)))
                cluster.handle(core.SliceReleased(slice_id=chosen))
            case "gone":
                client = data.draw(st.integers(1, 3))
                cluster.handle(core.ClientGone(client_id=client))
                assert all(item.client_id != client for item in cluster.slices.values())
                cluster.clients[client] = "another of this number"
            case "exited" if cluster.slices:
                chosen = data.draw(st.sampled_from(sorted(cluster.slices)))
                cluster.handle(core.ProcessExited(name=process_of(cluster.slices[chosen]), reason="signal 9"))
        for island in cluster.islands.values():
            mine = [item for item in cluster.slices.values() if item.island_id == island.island_id]
            mine = [item for item in mine if item.state != "failed"]
            expected = [sum(d in item.device_indices for item in mine) for d in range(len(island.load))]
            assert island.load == expected
            assert max(expected) - min(expected) <= 1 + len(mine)
    for client in (1, 2, 3):
        cluster.handle(core.ClientGone(client_id=client))
    assert all(not any(island.load) for island in cluster.islands.values())
    assert not cluster.slices


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_after_many_clients_every_collection_is_as_large_as_after_a_few(data):
    cluster = make_cluster(3, 2)
    after = []
    for client in range(4, 24):
        assert cluster.attach("one") == client
        mine = [reserve(cluster, data.draw(st.integers(1, 2)), client=client) for _ in range(2)]
        for item in mine:
            match data.draw(st.sampled_from(["ready", "release", "exited", ""])):
                case "ready":
                    make_ready(cluster, item)
                case "release":
                    cluster.handle(core.SliceReleased(slice_id=item.slice_id))
                case "exited":
                    cluster.handle(core.ProcessExited(name=process_of(item), reason="signal 9"))
        cluster.handle(core.ClientGone(client_id=client))
        for name in list(cluster.device_sets):
            cluster.handle(core.IdleOver(name=name, period=cluster.device_sets[name].num_idle))
        assert not cluster.device_sets
        for item in mine:  # what comes late
            assert cluster.handle(core.ExecutorReady(executor_id=item.executor_ids[0], info="info")) == []
            assert cluster.handle(core.ProcessExited(name=process_of(item), reason="signal 15")) == []
        after.append(sizes(cluster))
    assert after[-1] == after[1]


def test_a_slice_over_several_hosts_has_an_executor_on_each_and_is_ready_with_all():
    cluster = with_clients()
    joined = core.NodeJoined(node_id=0, host="here", platform="simulated", devices_per_island=(8,), hosts_per_island=4)
    cluster.handle(joined)
    cluster.handle(core.SchedulerReady(island_id=0, address="address", pid=1))
    item, commands = cluster.reserve(1, (5,), ("dp",), None)
    assert [(c.executor_id, c.device_indices) for c in commands] == [
        ("i0.e1.h0", (0, 1)),
        ("i0.e1.h1", (2, 3)),
        ("i0.e1.h2", (4,)),
    ]
    for executor_id in item.executor_ids[:-1]:
        assert cluster.handle(core.ExecutorReady(executor_id=executor_id, info="info")) == []
    (connect,) = cluster.handle(core.ExecutorReady(executor_id="i0.e1.h2", info="info"))
    assert isinstance(connect, core.ConnectSlice)
    lost = cluster.handle(core.ProcessExited(name="executor i0.e1.h1", reason="signal 9"))
    assert lost[0].executor_id == "i0.e1.h1"
    ended = [c.name for c in lost if isinstance(c, core.EndProcess)]
    assert ended == ["executor i0.e1.h0", "executor i0.e1.h2"]


def test_an_executor_that_its_scheduler_does_not_reach_is_ended_and_replaced():
    cluster = make_cluster(2)
    first, second = reserve(cluster, 2), reserve(cluster, 2, client=2)
    make_ready(cluster, first)
    assert second.is_connecting
    commands = cluster.handle(core.ExecutorCutOff(executor_id="i0.e1", reason="its scheduler does not reach it"))
    assert [c.client_id for c in commands if isinstance(c, core.TellLost)] == [1, 2]
    assert core.EndProcess(node_id=0, name="executor i0.e1") in commands
    assert second.failure.message == "executor i0.e1 is lost: its scheduler does not reach it"
    third, commands = cluster.reserve(1, (2,), ("dp",), None)
    assert (third.executor_ids, [type(command) for command in commands]) == (("i0.e2",), [core.StartExecutor])
    assert cluster.handle(core.ExecutorCutOff(executor_id="i0.e1", reason="again")) == []
