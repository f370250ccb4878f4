"""Batches read beside the executors (`tw.data_loader`), against host tensors that the controller sends with each run.

How to read it: README.md beside this file. `python -m benchmarks.input_pipeline --help`.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from matplotlib.axes import Axes
from torch.utils.data import DataLoader, Dataset

import torchways as tw
from benchmarks.report import argument_parser, finish, machine, median, numbers, paired_ratio, panel, print_table

KINDS = ("torchways", "sent", "put")
ROWS = 64
#: Of Linux's struct tcp_info: bytes that the other end has acknowledged, and bytes received.
_TCP_INFO_BYTES, _TCP_INFO_OFFSET = 192, 120


class Blocks(Dataset[torch.Tensor]):
    """Items that cost nothing but their copy into the batch: rows of one tensor."""

    def __init__(self, item_bytes: int, num_items: int) -> None:
        self._rows = torch.arange(ROWS * (item_bytes // 4), dtype=torch.float32).reshape(ROWS, -1)
        self._num_items = num_items

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._rows[index % ROWS]


class Pipeline:
    """Steps on one slice, whose computation reads a corner of the batch, and batches of one size for them."""

    def __init__(self, batch_bytes: int, devices: int, num_batches: int, num_workers: int) -> None:
        self.num_batches = num_batches
        self.batch_bytes = batch_bytes
        mesh = tw.init_device_mesh((devices,), mesh_dim_names=("dp",))
        self._steps = {kind: tw.program(lambda batch: batch[:, :1].sum(), mesh=mesh) for kind in KINDS}
        sizes = [batch_bytes // ROWS, ROWS * num_batches]
        self._ours = tw.data_loader(
            "benchmarks.input_pipeline:Blocks", mesh, args=sizes, batch_size=ROWS, num_workers=num_workers
        )
        self._theirs = DataLoader(Blocks(*sizes), batch_size=ROWS, num_workers=num_workers)
        self.batches: dict[str, Callable[[], Iterator[Any]]] = {
            "torchways": lambda: iter(self._ours),
            "sent": lambda: iter(self._theirs),
            "put": lambda: (tw.distribute_tensor(batch, mesh, ["S(0)"]) for batch in self._theirs),
        }

    def run(self, kind: str) -> tuple[float, float]:
        """Takes all batches of an epoch; returns bytes of batches a second, and bytes of the controller's a step.

        The first two steps are not counted: they start the workers.
        """
        batches, step = self.batches[kind](), self._steps[kind]
        for _ in range(2):
            step(next(batches)).item()
        sent, started = controller_bytes(), time.perf_counter()
        losses = [step(batch) for batch in batches]
        losses[-1].item()
        seconds = time.perf_counter() - started
        return self.batch_bytes * len(losses) / seconds, (controller_bytes() - sent) / len(losses)

    def close(self) -> None:
        """Ends the data process."""
        self._ours.close()


def controller_bytes() -> int:
    """Returns the bytes that all TCP connections of this process have carried, both ways."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                    total += sum(struct.unpack_from("QQ", info, _TCP_INFO_OFFSET))
        except OSError:  # it was closed meanwhile, or is no TCP socket
            continue
    return total


def run(sizes: list[int], devices: list[int], num_batches: int, num_workers: int, repeats: int) -> dict[str, Any]:
    """Measures all sizes; returns the table's rows."""
    rows = []
    for count in devices:
        with tw.init(islands=1, devices_per_island=count):
            rows += [_row(size, count, num_batches, num_workers, repeats) for size in sizes]
    return {"machine": machine(), "workers": num_workers, "rows": rows}


def _row(size: int, devices: int, num_batches: int, num_workers: int, repeats: int) -> dict[str, Any]:
    pipeline = Pipeline(size, devices, num_batches, num_workers)
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for _ in range(repeats + 1):
        for kind in KINDS:
            found[kind].append(pipeline.run(kind))
    pipeline.close()
    speeds = {kind: [speed for speed, _ in values[1:]] for kind, values in found.items()}  # the first warms up
    return {
        "batch_mb": size / 2**20,
        "devices": devices,
        "ours_gb_per_s": median(speeds["torchways"]) / 1e9,
        "sent_gb_per_s": median(speeds["sent"]) / 1e9,
        "put_gb_per_s": median(speeds["put"]) / 1e9,
        "ours_over_sent": paired_ratio(speeds["torchways"], speeds["sent"]),
        "ours_over_put": paired_ratio(speeds["torchways"], speeds["put"]),
        "spread_of_ours": (max(speeds["torchways"]) - min(speeds["torchways"])) / median(speeds["torchways"]),
        "our_bytes_a_step": round(median([count for _, count in found["torchways"][1:]])),
        "sent_bytes_a_step": round(median([count for _, count in found["sent"][1:]])),
    }


def draw(rows: list[dict[str, Any]]) -> Axes:
    """Returns the throughput over the size of a batch."""
    axes = panel("MB a batch", "GB/s of batches")
    for devices in sorted({row["devices"] for row in rows}):
        mine = [row for row in rows if row["devices"] == devices]
        labels = {"ours": "tw.data_loader", "sent": "sent with the run", "put": "tw.distribute_tensor"}
        for kind, label in labels.items():
            key = f"{kind}_gb_per_s"
            axes.plot([r["batch_mb"] for r in mine], [r[key] for r in mine], "o-", label=f"{label}, {devices} devices")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend()
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", type=numbers, default=[1 << 20, 8 << 20, 64 << 20], help="bytes of a batch")
    parser.add_argument("--devices", type=numbers, default=[1, 2], help="devices of the slice")
    parser.add_argument("--batches", type=int, default=22, help="batches of an epoch, of which two warm up")
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader, on either side")
    given = parser.parse_args()
    results = run(given.sizes, given.devices, given.batches, given.workers, given.repeats)
    print_table(list(results["rows"][0]), [list(row.values()) for row in results["rows"]])
    finish("input_pipeline", results, draw(results["rows"]), print_json=given.json)


if __name__ == "__main__":
    main()
