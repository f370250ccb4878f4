"""The page /metrics: what is on it, and by which names."""

from prometheus_client import CollectorRegistry, generate_latest

from tests.unit.cli.observations import observation, share
from torchways.cluster.metrics import metric_families
from torchways.rpc import torchways_pb2 as pb


class _Fixed:
    def __init__(self, families):
        self.families = families

    def collect(self):
        return self.families


def page(found):
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed(metric_families(found)))
    return generate_latest(registry).decode().splitlines()


def test_names_labels_and_values():
    lines = page(
        observation(
            10, share(1, busy_seconds=5.0, num_finished=100), share(2, weight=3.0, busy_seconds=1.5, num_held=4)
        )
    )
    for expected in (
        'torchways_device_busy_seconds_total{client="1",device="0",island="0"} 5.0',
        'torchways_device_busy_seconds_total{client="2",device="1",island="0"} 1.5',
        'torchways_queue_seconds{devices="0 1",island="0"} 0.004',
        'torchways_runs_held{client="2",island="0"} 4.0',
        'torchways_runs_in_flight{client="1",island="0"} 0.0',
        'torchways_runs_finished_total{client="1",island="0"} 100.0',
        'torchways_client_weight{client="2",island="0"} 3.0',
        'torchways_buffer_bytes{client="2",executor="i0.e1",island="0"} 3000.0',
        'torchways_memory_used_bytes{executor="i0.e1",island="0"} 4000.0',
        'torchways_memory_budget_bytes{executor="i0.e1",island="0"} 10000.0',
        'torchways_functions_compiled_total{executor="i0.e1",island="0"} 3.0',
        'torchways_compile_seconds_total{executor="i0.e1",island="0"} 2.5',
        'torchways_process_resident_memory_bytes{pid="4711",process="scheduler i0"} 5e+07',
        'torchways_slices{island="0",state="ready"} 1.0',
        'torchways_slices{island="0",state="failed"} 0.0',
        "torchways_clients 2.0",
        "torchways_unreachable_processes 0.0",
    ):
        assert expected in lines


def test_overlapping_sets_of_devices_are_added_up():
    found = observation(10, share(1, busy_seconds=5.0))
    another = found.schedulers[0].status.device_sets.add(executor_ids=["i0.e2"], device_indices=[1])
    another.clients.add(client_id=1, busy_seconds=2.0, num_finished=3)
    lines = page(found)
    assert 'torchways_device_busy_seconds_total{client="1",device="0",island="0"} 5.0' in lines
    assert 'torchways_device_busy_seconds_total{client="1",device="1",island="0"} 7.0' in lines
    assert 'torchways_runs_finished_total{client="1",island="0"} 3.0' in lines


def test_nothing_is_a_page_too():
    assert "torchways_clients 0.0" in page(pb.Observation())
