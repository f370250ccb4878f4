"""Observations of a cluster of one island of two devices, as the resource manager returns them."""

from torchways.rpc import torchways_pb2 as pb


def share(client_id, **fields):
    return pb.ClientShare(**{"client_id": client_id, "weight": 1.0, **fields})


def observation(seconds, *shares, **fields):
    """Two devices in one set, at a time, with what each client had of them."""
    status = pb.SchedulerStatus(
        device_sets=[
            pb.DeviceSetStatus(
                executor_ids=["i0.e1"],
                device_indices=[0, 1],
                busy_seconds=sum(item.busy_seconds for item in shares),
                admitted_seconds=0.004,
                clients=shares,
            )
        ],
        waits=["run 7 of client 2: its turn"],
    )
    executor = pb.ExecutorStatus(
        executor_id="i0.e1",
        client_bytes={1: 1000, 2: 3000},
        used_bytes=4000,
        budget_bytes=10_000,
        num_compiled=3,
        compile_seconds=0.25 * seconds,
        num_entries={"loaded": 2},
        waiting_for=["run 9 of step: its compilation", "run 10 of step: its compilation"],
    )
    return pb.Observation(
        **{
            "time_ns": int(seconds * 1e9),
            "cluster": pb.ClusterInfo(
                islands=[
                    pb.IslandInfo(
                        island_id=0,
                        platform="cpu",
                        num_devices=2,
                        scheduler_address="127.0.0.1:1",
                        slices=[pb.SliceSummary(slice_id=1, client_id=1, state="ready")],
                    )
                ],
                processes=[pb.ProcessInfo(name="scheduler i0", pid=4711, rss_bytes=50_000_000)],
            ),
            "clients": [pb.ClientInfo(client_id=1, name="a.py"), pb.ClientInfo(client_id=2, name="[b].py")],
            "schedulers": [pb.IslandStatus(island_id=0, status=status)],
            "executors": [pb.ExecutorObservation(island_id=0, device_indices=[0, 1], status=executor)],
            **fields,
        }
    )
