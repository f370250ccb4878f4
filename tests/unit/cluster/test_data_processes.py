"""The resource manager's core: data processes start with a slice of their client's and end with it."""

import pytest

from tests.unit.cluster.test_state import make_cluster, make_ready, process_of, reserve
from torchways.cluster import state as core
from torchways.errors import ClusterLost, ConfigError, PlacementError, ResourceExhausted


def with_data(*devices):
    cluster = make_cluster(*devices)
    for island in cluster.islands.values():
        island.has_data_processes = True
    return cluster


def start(cluster, item):
    process, commands = cluster.start_data_process(item.client_id, item.slice_id)
    assert commands == [core.StartData(node_id=0, name=process.name, client_id=item.client_id)]
    return process


def ended(process):
    return [
        core.SettleDataProcess(process_id=process.process_id),
        core.EndProcess(node_id=0, name=process.name),
    ]


def test_a_data_process_is_ready_and_then_lost_with_its_last_lines():
    cluster = with_data(2)
    process = start(cluster, reserve(cluster, 2))
    assert not process.is_settled
    settle = core.SettleDataProcess(process_id=process.process_id)
    assert cluster.handle(core.DataProcessReady(name=process.name, address="here:1", pid=7)) == [settle]
    assert (process.address, process.pid, process.is_settled) == ("here:1", 7, True)
    exited = core.ProcessExited(name=process.name, reason="process 7 ended by signal 9 (SIGKILL)", log_tail="oh\n")
    assert cluster.handle(exited) == [settle]
    assert process.failure.kind == "DataProcessLost"
    assert process.failure.message == (
        "data process 1 is lost: process 7 ended by signal 9 (SIGKILL); the last lines that it wrote:\noh"
    )
    assert cluster.end_data_process(process.process_id) == [settle]
    assert cluster.end_data_process(process.process_id) == []
    assert cluster.handle(core.DataProcessReady(name=process.name, address="here:1", pid=7)) == []


@pytest.mark.parametrize("end", ["release", "client", "executor"])
def test_data_processes_end_with_their_slice(end):
    cluster = with_data(2, 2)
    item, other = reserve(cluster, 2), reserve(cluster, 2, client=2)
    make_ready(cluster, item)
    mine, theirs = [start(cluster, item), start(cluster, item)], start(cluster, other)
    event = {
        "release": core.SliceReleased(slice_id=item.slice_id),
        "client": core.ClientGone(client_id=1),
        "executor": core.ProcessExited(name=process_of(item), reason="signal 9"),
    }[end]
    commands = cluster.handle(event)
    told = [c for c in commands if isinstance(c, core.SettleDataProcess)]
    told += [c for c in commands if isinstance(c, core.EndProcess) and c.name.startswith("data process")]
    assert sorted(map(str, told)) == sorted(map(str, [command for process in mine for command in ended(process)]))
    assert list(cluster.data_processes.values()) == [theirs]
    if end == "executor":
        with pytest.raises(PlacementError, match="slice 1 is closed or lost"):
            cluster.start_data_process(1, item.slice_id)


def test_none_starts_where_the_node_agent_forbids_it_nor_without_end():
    cluster = with_data(2)
    item = reserve(cluster, 1)
    processes = [start(cluster, item) for _ in range(64)]
    with pytest.raises(ResourceExhausted, match="slice 1 has 64 data processes, the most"):
        cluster.start_data_process(1, item.slice_id)
    cluster.handle(core.ProcessExited(name=processes[3].name, reason="exit code 1"))
    new, commands = cluster.start_data_process(1, item.slice_id)  # in the place of one that has ended
    assert commands == [
        core.SettleDataProcess(process_id=processes[3].process_id),
        core.StartData(node_id=0, name=new.name, client_id=1),
    ]
    assert len(cluster.data_processes) == 64
    cluster.islands[0].has_data_processes = False
    with pytest.raises(ConfigError, match=r"island 0 runs no input pipelines of clients.*--data-path"):
        cluster.start_data_process(1, item.slice_id)
    with pytest.raises(PlacementError, match="slice 9 is closed or lost"):
        cluster.start_data_process(1, 9)
    cluster.close("enough")
    with pytest.raises(ClusterLost, match="enough"):
        cluster.start_data_process(1, item.slice_id)
