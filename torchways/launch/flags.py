"""A cluster's settings as flags of its node agent: what starts one writes them, and the agent reads them."""

from __future__ import annotations

import argparse
import os

from torchways.config import ClusterConfig


def flags(config: ClusterConfig) -> list[str]:
    """Returns the flags that give a node agent these settings."""
    return [
        *("--islands", str(config.islands)),
        *("--devices-per-island", str(config.devices_per_island)),
        *("--hosts-per-island", str(config.hosts_per_island)),
        *("--platform", config.platform),
        *("--scheduling", config.scheduling),
        *("--host", config.host),
        *("--budget-bytes", str(config.budget_bytes)),
        *("--client-bytes", str(config.client_memory or 0)),
        *("--client-programs", str(config.client_programs)),
        *("--memory-wait", str(config.memory_wait.total_seconds())),
        *("--stall-warning", str(config.stall_warning.total_seconds())),
        *("--executor-idle", str(config.executor_idle.total_seconds())),
        *("--policy", config.policy),
        *("--window", str(config.window.total_seconds())),
        *("--max-weight", str(config.max_weight)),
        *("--max-priority", str(config.max_priority)),
        *(("--metrics-port", str(config.metrics_port)) if config.metrics_port is not None else ()),
        *(("--log-dir", config.log_dir) if config.log_dir is not None else ()),
        *(("--data-path", os.pathsep.join(config.data_path)) if config.data_path is not None else ()),
    ]


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the node agent's command line."""
    result = argparse.ArgumentParser(description="Node agent: runs the torchways processes of this machine.")
    result.add_argument("--join", help="resource manager to join; without it this node is the head and starts one")
    result.add_argument("--islands", type=int, default=1)
    result.add_argument("--devices-per-island", type=int, default=1)
    result.add_argument("--hosts-per-island", type=int, default=1)
    result.add_argument("--platform", default="cpu")
    result.add_argument("--scheduling", choices=["gang", "arrival"], default="gang")
    result.add_argument("--host", default="127.0.0.1")
    result.add_argument("--budget-bytes", type=int, default=0)
    result.add_argument("--client-bytes", type=int, default=0)
    result.add_argument("--client-programs", type=int, default=1 << 30)
    result.add_argument("--memory-wait", type=float, default=60.0)
    result.add_argument("--stall-warning", type=float, default=30.0)
    result.add_argument("--executor-idle", type=float, default=60.0)
    result.add_argument("--policy", default="proportional_share")
    result.add_argument("--window", type=float, default=0.005, help="seconds of device time that are admitted ahead")
    result.add_argument("--max-weight", type=float, default=16.0)
    result.add_argument("--max-priority", type=int, default=10)
    result.add_argument(
        "--metrics-port", type=int, help="of the web page and /metrics; 0 chooses one; without it there are none"
    )
    result.add_argument("--state", help="state file of the cluster (launch/state_file.py)")
    result.add_argument("--stays", action="store_true", help="live until SIGTERM, whatever becomes of stdin")
    result.add_argument(
        "--data-path",
        help="folders, as in PYTHONPATH, from which clients' input pipelines (tw.data_loader) may import code, besides "
        'installed packages; "" for these alone. Without it clients may run none: it is running code as this user',
    )
    result.add_argument("--log-dir")
    result.add_argument("--ready-fd", type=int, help="gets one JSON line, with `address` or `error`")
    result.add_argument("--owner-pid", type=int, help="end with this process, even while stdin is open")
    return result
