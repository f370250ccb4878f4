"""What starts a cluster and its node agent understand the same by the agent's flags."""

from datetime import timedelta

from torchways.config import ClusterConfig
from torchways.launch.flags import flags, parser


def test_settings_arrive():
    config = ClusterConfig(
        islands=3,
        devices_per_island=4,
        hosts_per_island=2,
        platform="simulated",
        policy="my.module:Policy",
        window=timedelta(milliseconds=2.5),
        max_weight=4.0,
        max_priority=3,
        metrics_port=0,
        memory_budget=5000,
        data_path=("/a", "/b"),
        log_dir="/logs",
    )
    found = parser().parse_args(flags(config))
    assert (found.islands, found.devices_per_island, found.hosts_per_island, found.platform) == (3, 4, 2, "simulated")
    assert (found.policy, found.window, found.max_weight, found.max_priority) == ("my.module:Policy", 0.0025, 4.0, 3)
    assert (found.metrics_port, found.budget_bytes, found.data_path, found.log_dir) == (0, 5000, "/a:/b", "/logs")


def test_what_is_not_set_is_left_out():
    found = parser().parse_args(flags(ClusterConfig()))
    assert (found.metrics_port, found.data_path, found.log_dir, found.state, found.stays) == (None,) * 4 + (False,)
