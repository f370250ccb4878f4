"""`torchways status`: what a cluster consists of."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torchways.cli.target import access, add_target_flags, command_parser

if TYPE_CHECKING:
    from torchways.rpc import torchways_pb2 as pb

_EXAMPLES = """\
  torchways status
  torchways status --json | jq '.processes[].pid'
  twrun --address "$(torchways status --address-only)" train.py
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = command_parser(commands, "status", "show islands, devices, slices, clients and processes", _EXAMPLES)
    add_target_flags(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--address-only", action="store_true", help="print host:port, once the cluster answers")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Asks and prints."""
    from torchways.rpc.operator import ask

    target = access(parsed)
    found = ask(target, lambda client: client.observe())
    facts = facts_of(target.address, found)
    if parsed.address_only:
        print(target.address)
    elif parsed.json:
        print(json.dumps(facts, indent=1))
    else:
        print(as_text(facts))
    return 0


def facts_of(address: str, found: pb.Observation) -> dict[str, Any]:
    """Returns what was observed, as JSON has it."""
    return {
        "address": address,
        "metrics_address": found.metrics_address,
        "islands": [
            {
                "island": island.island_id,
                "platform": island.platform,
                "num_devices": island.num_devices,
                "slices": [
                    {
                        "slice_id": item.slice_id,
                        "client_id": item.client_id,
                        "shape": list(item.shape),
                        "axis_names": list(item.axis_names),
                        "devices": list(item.device_indices),
                        "state": item.state,
                    }
                    for item in island.slices
                ],
            }
            for island in found.cluster.islands
        ],
        "clients": [{"client_id": client.client_id, "name": client.name} for client in found.clients],
        "processes": [
            {"name": process.name, "pid": process.pid, "host": process.host, "rss_bytes": process.rss_bytes}
            for process in found.cluster.processes
            if process.pid  # else it is still starting
        ],
        "stalls": [line for executor in found.executors for line in executor.status.stalls],
        "unreachable": list(found.unreachable),
    }


def as_text(facts: dict[str, Any]) -> str:
    """Returns the same for people."""
    metrics = f", metrics at http://{facts['metrics_address']}/metrics" if facts["metrics_address"] else ""
    islands = [
        (str(i["island"]), i["platform"], str(i["num_devices"]), str(len(i["slices"]))) for i in facts["islands"]
    ]
    slices = [
        (
            str(item["slice_id"]),
            str(island["island"]),
            ", ".join(f"{axis}={size}" for axis, size in zip(item["axis_names"], item["shape"], strict=True)),
            " ".join(map(str, item["devices"])),
            str(item["client_id"]),
            item["state"],
        )
        for island in facts["islands"]
        for item in island["slices"]
    ]
    clients = [(str(client["client_id"]), client["name"]) for client in facts["clients"]]
    processes = [
        (process["name"], str(process["pid"]), f"{process['rss_bytes'] / 1e6:,.0f}", process["host"])
        for process in facts["processes"]
    ]
    parts = [
        f"cluster at {facts['address']}{metrics}",
        _table(("ISLAND", "PLATFORM", "DEVICES", "SLICES"), islands),
        _table(("SLICE", "ISLAND", "MESH", "DEVICES", "CLIENT", "STATE"), slices) if slices else "no slices",
        _table(("CLIENT", "NAME"), clients) if clients else "no clients",
        _table(("PROCESS", "PID", "MB", "HOST"), processes),
        *(["STALLED RUNS\n" + "\n".join(facts["stalls"])] if facts["stalls"] else []),
        *(f"{name} does not answer" for name in facts["unreachable"]),
    ]
    return "\n\n".join(parts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
