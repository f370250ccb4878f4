"""Settings of a cluster. The dataclass is the truth; the launcher's flags and `tw.init` fill it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

import psutil

from torchways.addresses import is_wildcard
from torchways.errors import ConfigError

PLATFORMS = ("cpu", "tpu", "simulated")
POLICIES = ("proportional_share", "first_come_first_served", "priority")
LOG_FORMATS = ("text", "json")
SCHEDULING = ("gang", "arrival")
#: Of a client's share of the devices. Sums of device time over much smaller ones lose their precision.
LEAST_WEIGHT = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The size and limits of a cluster that `tw.init()` without an address, or `twrun`, starts."""

    islands: int = 2
    """Number of islands on this machine."""
    devices_per_island: int = 2
    """Devices of each island; on CPU these are virtual devices of one machine."""
    platform: str = "cpu"
    """"cpu" or "tpu": the PJRT platform of the executors. "simulated": no accelerator. Values are computed by plain
    PyTorch, and devices are queues that behave like those of several hosts (runtime/simulated.py)."""
    hosts_per_island: int = 1
    """Number of host processes that the devices of an island are split over. More than one needs a platform whose
    computations span processes."""
    scheduling: str = "gang"
    """Order in which computations of several hosts enter the device queues. "gang": the order of the island's
    scheduler. "arrival": order of arrival, which can deadlock; it exists to show that."""
    host: str = "127.0.0.1"
    """Address of this machine that servers listen on, and that clients connect to. Anything but loopback opens them to
    the network (the token still guards)."""
    log_level: str = "warning"
    """Log level of every process: debug, info, warning or error."""
    log_format: str | None = None
    """"text", or "json": one JSON object per line, with time, level, process, pid, logger, message and exception. If
    None, what TORCHWAYS_LOG_FORMAT says, or text."""
    log_dir: str | None = None
    """Folder with one log file per process. If None, everything goes to stderr."""
    memory_budget: int | None = None
    """Bytes that buffers may occupy on each device. A computation that needs more waits until others have finished.
    If None: on CPU an equal share of 80 % of the machine's memory, on TPU no limit."""
    client_memory: int | None = None
    """Bytes of them that one client's arrays and runs may occupy. A client that has reached this waits until it has
    given something back, and no other waits with it. If None, one client may have all."""
    client_programs: int = 1 << 30
    """Bytes of registered programs (graphs and plans, as they are sent) that one client may have on an executor. A
    program above that is refused as one that cannot be compiled. Traces that are not used any more are given back
    (`max_variants`)."""
    memory_wait: timedelta = timedelta(seconds=60)
    """How long a computation may wait for memory when nothing is running that could free any. Then it fails."""
    stall_warning: timedelta = timedelta(seconds=30)
    """How long a run may make no progress before its executor says in its log, in one line, which computation it never
    did and what that waits for. `torchways status` and `top` show the same."""
    policy: str = "proportional_share"
    """Which client's run is next when several wait for the same devices. "proportional_share": each client gets device
    time by its weight. "first_come_first_served": by order of arrival. "priority": the highest priority first; runs
    that wait long rise. "module:Class": a policy of your own, which the schedulers import."""
    window: timedelta = timedelta(milliseconds=5)
    """How much device time a scheduler admits ahead to a set of devices. It must cover the round trip between
    scheduler and executor, or devices idle. The larger it is, the longer a run of another client waits. While one
    client alone can want the devices, it is 50 times as long."""
    max_weight: float = 16.0
    """The largest weight that a client may ask for. The smallest is 0.001."""
    max_priority: int = 10
    """The highest priority that a client may ask for."""
    metrics_port: int | None = None
    """Port of the cluster's web page `/` and of `/metrics` for Prometheus, on `host`. 0 chooses a free port. If None,
    there are none."""
    executor_idle: timedelta = timedelta(seconds=60)
    """How long an executor stays alive after the last slice of its devices is closed. A new slice of the same devices
    is ready at once until then."""
    data_path: tuple[str, ...] | None = None
    """Folders from which input pipelines (`tw.data_loader`) import datasets, besides the environment. If None, no
    client may run one: that is running code as the cluster's user. `tw.init()` and `twrun` give their
    own import path."""
    start_timeout: timedelta = timedelta(seconds=120)
    """Longest wait for the cluster, or for the executors of a slice, to be ready. Importing torch-xla takes seconds, or
    tens of seconds on a loaded machine."""

    def __post_init__(self) -> None:
        for name in ("islands", "devices_per_island", "hosts_per_island"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if is_wildcard(self.host):
            raise ConfigError(f"host must name an address of this machine that clients can reach, not {self.host!r}")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ConfigError(f"memory_budget must be at least 1 byte, not {self.memory_budget!r}")
        if self.client_memory is not None and self.client_memory < 1:
            raise ConfigError(f"client_memory must be at least 1 byte, not {self.client_memory!r}")
        if self.client_programs < 1:
            raise ConfigError(f"client_programs must be at least 1 byte, not {self.client_programs!r}")
        if self.platform not in PLATFORMS:
            raise ConfigError(f"platform must be one of {', '.join(PLATFORMS)}, not {self.platform!r}")
        if self.scheduling not in SCHEDULING:
            raise ConfigError(f"scheduling must be one of {', '.join(SCHEDULING)}, not {self.scheduling!r}")
        if self.log_format is not None and self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format must be one of {', '.join(LOG_FORMATS)}, not {self.log_format!r}")
        if self.policy not in POLICIES and not _names_class(self.policy):
            raise ConfigError(f'policy must be one of {", ".join(POLICIES)}, or "module:Class", not {self.policy!r}')
        if self.stall_warning <= timedelta(0):
            raise ConfigError(f"stall_warning must be longer than 0 s, not {self.stall_warning.total_seconds():g} s")
        if self.window <= timedelta(0):
            raise ConfigError(f"window must be longer than 0 s, not {self.window.total_seconds():g} s")
        if not LEAST_WEIGHT <= self.max_weight < math.inf:
            raise ConfigError(f"max_weight must be a number from {LEAST_WEIGHT:g}, not {self.max_weight!r}")
        if self.max_priority < 0:
            raise ConfigError(f"max_priority must be at least 0, not {self.max_priority!r}")
        if self.metrics_port is not None and not 0 <= self.metrics_port < 1 << 16:
            raise ConfigError(f"metrics_port must be between 0 and 65535, not {self.metrics_port!r}")
        if self.devices_per_island % self.hosts_per_island:
            uneven = f"{self.devices_per_island} devices cannot be split evenly over {self.hosts_per_island}"
            raise ConfigError(f"{uneven} hosts: make devices_per_island a multiple of hosts_per_island")
        if self.hosts_per_island > 1 and self.platform == "cpu":
            raise ConfigError("a CPU computation cannot span processes: use hosts_per_island=1, or another platform")

    @property
    def budget_bytes(self) -> int:
        """Bytes that buffers may take on each device; 0: no limit."""
        if self.memory_budget is not None:
            return self.memory_budget
        if self.platform == "tpu":
            return 0
        return int(0.8 * psutil.virtual_memory().total) // (self.islands * self.devices_per_island)


def _names_class(policy: str) -> bool:
    module, colon, name = policy.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))
