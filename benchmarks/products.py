"""Products of matrices, as linear layers have them, by XLA's kernels for the CPU and by PyTorch's.

How to read it: README.md beside this file. `python -m benchmarks.products --help`.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from matplotlib.axes import Axes

from benchmarks.report import argument_parser, finish, machine, median, numbers, paired_ratio, panel, print_table

KERNELS = ("XLA", "PyTorch")
#: Rows of the batch, and features that go in and out; of the models of `benchmarks.spmd` with these names.
LAYERS = {"tiny": (1024, 128, 512), "mini": (1024, 192, 768), "small": (2048, 256, 1024)}
PRODUCTS = ("forward", "input's gradient", "weight's gradient")
_SECONDS = 0.3
_ANSWER_SECONDS = 120


class Kernels:
    """A process that multiplies with the kernels of one of the two, on so many threads."""

    def __init__(self, kind: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(kind, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def rate(self, layer: tuple[int, int, int], product: str) -> float:
        """Returns floating-point operations a second."""
        self._connection.send((layer, product))
        if not self._connection.poll(_ANSWER_SECONDS):
            raise RuntimeError(f"no answer in {_ANSWER_SECONDS} s")
        rate: float = self._connection.recv()
        return rate

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(10)
        self._process.kill()


def _serve(kind: str, threads: int, connection: Connection) -> None:
    os.environ.update(PJRT_DEVICE="CPU", NPROC=str(threads), OMP_NUM_THREADS=str(threads))
    import torch  # it reads these when it is imported

    device = torch.device("cpu")
    wait: Callable[[], None] = lambda: None  # noqa: E731
    if kind == "XLA":
        import torch_xla

        device = torch_xla.device()
        wait = lambda: torch_xla.sync(wait=True)  # noqa: E731
    while True:
        try:
            (rows, inputs, outputs), product = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        x, weight, gradient = (
            torch.randn(shape, device=device) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        multiply = {
            "forward": lambda x=x, weight=weight: x @ weight.t(),
            "input's gradient": lambda gradient=gradient, weight=weight: gradient @ weight,
            "weight's gradient": lambda gradient=gradient, x=x: gradient.t() @ x,
        }[product]
        result = multiply()  # XLA compiles it
        wait()
        count, started = 0, time.perf_counter()
        while time.perf_counter() < started + _SECONDS:
            result = multiply()
            wait()
            count += 1
        connection.send(2 * rows * inputs * outputs * count / (time.perf_counter() - started))
        del result


def run(threads: list[int], repeats: int) -> list[dict[str, Any]]:
    """Measures all products on each number of threads."""
    rows = []
    for count in threads:
        kernels = {kind: Kernels(kind, count) for kind in KERNELS}
        try:
            for name, layer in LAYERS.items():
                for product in PRODUCTS:
                    found: dict[str, list[float]] = {kind: [] for kind in KERNELS}
                    for _ in range(repeats + 1):
                        for kind, process in kernels.items():
                            found[kind].append(process.rate(layer, product))
                    found = {kind: rates[1:] for kind, rates in found.items()}
                    rows.append(
                        {
                            "threads": count,
                            "model": name,
                            "rows x in x out": "x".join(map(str, layer)),
                            "product": product,
                            **{f"{kind}, GFLOP/s": median(rates) / 1e9 for kind, rates in found.items()},
                            "XLA over PyTorch": paired_ratio(found["XLA"], found["PyTorch"]),
                        }
                    )
        finally:
            for process in kernels.values():
                process.close()
    return rows


def draw(rows: list[dict[str, Any]]) -> Axes:
    """Returns XLA's speed over PyTorch's, a bar for each product."""
    axes = panel("XLA's speed over PyTorch's", "")
    axes.barh(
        [f"{row['model']}, {row['product']}, {row['threads']} threads" for row in rows],
        [row["XLA over PyTorch"] for row in rows],
    )
    axes.axvline(1.0, color="black", linewidth=0.8)
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--threads", type=numbers, default=[1, 2], help="of each process, separated by commas")
    arguments = parser.parse_args()
    rows = run(arguments.threads, arguments.repeats)
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    finish("products", {"machine": machine(), "rows": rows}, draw(rows), print_json=arguments.json)


if __name__ == "__main__":
    main()
