"""Tokens a second of `tw.generate`, against transformers' own generate on the CPU, and against a read for each token.

How to read it: README.md beside this file. `python -m benchmarks.generation --help`.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from matplotlib.axes import Axes
from transformers.generation.streamers import BaseStreamer

import torchways as tw
from benchmarks.report import argument_parser, finish, machine, median, numbers, paired_ratio, panel, print_table

PROMPT = 32
WAITING = "torchways, 1 a dispatch, each read"


class _Reader(BaseStreamer):
    """Makes `tw.generate` read every token; one more is dispatched meanwhile."""

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


def run(hidden: int, layers: int, batches: list[int], chunks: list[int], tokens: int, repeats: int) -> dict[str, Any]:
    """Measures a Llama of random weights; returns a row for each batch size and system."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        intermediate_size=hidden * 11 // 4,
        max_position_embeddings=PROMPT + tokens,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        ours = tw.function(copy.deepcopy(model), mesh=mesh)
        rows = [row for batch in batches for row in _rows(model, ours, batch, chunks, tokens, repeats)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"machine": machine(), "parameters": parameters, "prompt": PROMPT, "tokens": tokens, "rows": rows}


def _rows(model: Any, ours: Any, batch: int, chunks: list[int], tokens: int, repeats: int) -> list[dict[str, Any]]:
    ids = torch.randint(3, 8192, (batch, PROMPT))

    def run_ours(size: int, streamer: BaseStreamer | None = None) -> torch.Tensor:
        return tw.generate(
            ours, ids, max_new_tokens=tokens, eos_token_id=(), tokens_per_dispatch=size, streamer=streamer
        )

    def run_eager(num_threads: int) -> Any:
        torch.set_num_threads(num_threads)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    # On a machine with other work, PyTorch's threads wait for each other: one alone may be faster than one a core.
    eager = {
        f"transformers eager, {count} threads": lambda count=count: run_eager(count)  # type: ignore[misc]
        for count in sorted({1, os.cpu_count() or 1})
    }
    systems: dict[str, Callable[[], Any]] = {**eager, WAITING: lambda: run_ours(1, _Reader())}
    for size in chunks:
        systems[f"torchways, {size} a dispatch"] = lambda size=size: run_ours(size)  # type: ignore[misc]
    found: dict[str, list[float]] = {name: [] for name in systems}
    results = {name: generate() for name, generate in systems.items()}  # warm-up: traces and compiles
    agree = {name: bool(torch.equal(result, results[min(eager)])) for name, result in results.items()}
    for _ in range(repeats):
        for name, generate in systems.items():
            started = time.perf_counter()
            generate()
            found[name].append(batch * tokens / (time.perf_counter() - started))
    best_eager = [max(rates) for rates in zip(*(found[name] for name in eager), strict=True)]
    return [
        {
            "batch": batch,
            "system": name,
            "tokens_per_second": median(rates),
            "over_eager": paired_ratio(rates, best_eager),
            "over_waiting": paired_ratio(rates, found[WAITING]),
            "same_tokens": agree[name],
        }
        for name, rates in found.items()
    ]


def draw(rows: list[dict[str, Any]]) -> Axes:
    """Returns tokens a second by batch size."""
    axes = panel("batch", "tokens a second")
    for name in dict.fromkeys(row["system"] for row in rows):
        points = [(row["batch"], row["tokens_per_second"]) for row in rows if row["system"] == name]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend()
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16])
    parser.add_argument("--chunks", type=numbers, default=[1, 16], help="tokens_per_dispatch of each row")
    parser.add_argument("--tokens", type=int, default=65, help="tokens that each row of a batch gets")
    given = parser.parse_args()
    results = run(given.hidden, given.layers, given.batches, given.chunks, given.tokens, given.repeats)
    print(f"Llama of {results['parameters'] / 1e6:.0f} million parameters, {PROMPT} + {given.tokens} tokens")
    print_table(list(results["rows"][0]), [list(row.values()) for row in results["rows"]])
    finish("generation", results, draw(results["rows"]), print_json=given.json)


if __name__ == "__main__":
    main()
