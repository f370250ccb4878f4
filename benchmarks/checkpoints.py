"""Training steps while a checkpoint is written, against steps without; beside it, torch.distributed.checkpoint's own.

How to read it: README.md beside this file. `python -m benchmarks.checkpoints --help`.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from matplotlib.axes import Axes
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import torchways as tw
from benchmarks.report import argument_parser, finish, machine, median, paired_ratio, panel, print_table

OURS, THEIRS = "torchways", "async_save"
#: Of a step without a save.
WANTED = 1.1
VOCABULARY = 512
#: Width, layers and heads of a Llama.
SIZES = {"nano": (32, 2, 2), "micro": (64, 4, 4), "tiny": (128, 4, 4), "mini": (192, 8, 4), "small": (384, 8, 6)}


def build_model(size: str) -> torch.nn.Module:
    """Returns a model, with the weights that both systems begin with."""
    width, layers, heads = SIZES[size]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


class Training:
    """Steps of a model, and saves of its whole state.

    Args:
        step: makes a step, and waits for its loss.
        save: starts a checkpoint in a folder; returns what says whether it is complete.
    """

    def __init__(self, step: Callable[[], float], save: Callable[[Path], Callable[[], bool]]) -> None:
        self.step = step
        self._save = save

    def seconds(self, folder: Path | None, count: int) -> tuple[list[float], float]:
        """Returns what steps take, and a save: `count` steps, or with a folder those until the save is complete."""
        taken: list[float] = []
        is_complete: Callable[[], bool] | None = None
        begun = time.perf_counter()
        while True:
            started = time.perf_counter()
            if folder is not None and not taken:
                is_complete = self._save(folder)  # what the call itself takes belongs to the first step
            self.step()
            taken.append(time.perf_counter() - started)
            if is_complete() if is_complete is not None else len(taken) >= count:
                return taken, time.perf_counter() - begun


def open_ours(model: torch.nn.Module, tokens: torch.Tensor) -> Training:
    """Returns training on a slice of one device."""
    mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
    model = tw.parallelize_module(model, mesh, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    @tw.program
    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    state = {"model": model, "optimizer": optimizer}
    return Training(lambda: float(step(tokens)), lambda folder: tw.checkpoint.save(folder, state).done)


def open_theirs(model: torch.nn.Module, tokens: torch.Tensor) -> Training:
    """Returns training in eager PyTorch, in this process, and `torch.distributed.checkpoint.async_save`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def save(folder: Path) -> Callable[[], bool]:
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        found: Any = dcp.async_save(state, checkpoint_id=folder)
        done: Callable[[], bool] = found.done
        return done

    return Training(step, save)


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """`async_save` needs a process group, of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def run(sizes: list[str], batch: int, length: int, steps: int, repeats: int) -> dict[str, Any]:
    """Measures all sizes; returns the table's rows."""
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")
    folder = Path(tempfile.mkdtemp(prefix="torchways-checkpoints-"))
    try:
        with one_process_group(), tw.init(islands=1, devices_per_island=1):
            rows = [_row(size, batch, length, steps, repeats, folder / size) for size in sizes]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"machine": machine(), "rows": rows}


def _row(size: str, batch: int, length: int, steps: int, repeats: int, folder: Path) -> dict[str, Any]:
    tokens = torch.randint(VOCABULARY, (batch, length))
    systems = {OURS: open_ours(build_model(size), tokens), THEIRS: open_theirs(build_model(size), tokens)}
    row: dict[str, Any] = {
        "model": f"llama {size}",
        "parameters": sum(parameter.numel() for parameter in build_model(size).parameters()),
    }
    plain: dict[str, list[float]] = {name: [] for name in systems}
    beside: dict[str, list[float]] = {name: [] for name in systems}
    worst: dict[str, list[float]] = {name: [] for name in systems}
    saves: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(repeats + 1):
        for name, training in systems.items():
            without, _ = training.seconds(None, steps)
            during, seconds = training.seconds(folder / f"{name}-{turn}", steps)
            shutil.rmtree(folder / f"{name}-{turn}")
            if turn:  # the first warms up
                # Means: a loss may be here before its step is over, and one step's rest delays the loss of the next.
                plain[name].append(statistics.fmean(without))
                beside[name].append(statistics.fmean(during))
                worst[name].append(max(during))
                saves[name].append(seconds)
    for name in systems:
        row[name] = {
            "step_ms": 1e3 * median(plain[name]),
            "save_s": median(saves[name]),
            "during_over_without": paired_ratio(beside[name], plain[name]),
            "slowest_over_without": paired_ratio(worst[name], plain[name]),
        }
    return row


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns the header and the cells of what is printed."""
    header = ["model", "parameters", "system", "step, ms", "save, s", "step during / without", "slowest / without"]
    return header, [
        [row["model"], row["parameters"], name, *(row[name][key] for key in row[name])]
        for row in rows
        for name in (OURS, THEIRS)
    ]


def draw(rows: list[dict[str, Any]]) -> Axes:
    """Returns how much longer a step is during a save, by the model's size."""
    axes = panel("parameters", "a step during a save over one without")
    for name in (OURS, THEIRS):
        points = sorted((row["parameters"], row[name]["during_over_without"]) for row in rows)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(WANTED, color="gray", ls="--", lw=1)
    axes.set_xscale("log")
    axes.legend()
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", default="micro,tiny,mini,small", help="sizes of a Llama")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=8, help="steps without a save, in each turn")
    arguments = parser.parse_args()
    results = run(arguments.sizes.split(","), arguments.batch, arguments.length, arguments.steps, arguments.repeats)
    rows = results["rows"]
    print_table(*table(rows))
    enough = sum(row[OURS]["during_over_without"] <= WANTED for row in rows)
    print(f"a step during a save takes at most {WANTED} of one without in {enough} of {len(rows)} rows")
    finish("checkpoints", results, draw(rows), print_json=arguments.json)


if __name__ == "__main__":
    main()
