"""What it costs a call to ask whether its trace still holds, for the recipe's model and larger ones.

How to read it: README.md beside this file. `python -m benchmarks.conditions --help`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes

import torchways as tw
from benchmarks.report import argument_parser, finish, machine, median, numbers, panel, print_table
from recipes.models.gpt import GPT, GPTConfig
from torchways.controller.signatures import signature_of

CALLS = 200


def run(layers: list[int], repeats: int) -> dict[str, Any]:
    """Measures training steps of the recipe's model with a number of layers; returns a row for each."""
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        rows = [_row(number, mesh, repeats) for number in layers]
    return {"machine": machine(), "calls": CALLS, "rows": rows}


def _row(num_layers: int, mesh: Any, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=64, seq_len=8, d_model=16, n_layers=num_layers, n_heads=2)
    model = tw.parallelize_module(GPT(config), mesh)
    optimizer = torch.optim.AdamW(model.parameters())

    @tw.program
    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    tokens = torch.randint(0, 64, (2, 9))
    for _ in range(5):
        step(tokens).item()
    variant, state = step._last, step._last.state
    signature = signature_of((tokens,), {}, step.traced_function)
    hold, plain = [], []
    with_conditions, without = [], []
    for _ in range(repeats):
        hold.append(_us(lambda: state.hold(signature)))
        plain.append(_us(lambda: signature_of((tokens,), {}, step.traced_function)))
        with_conditions.append(_us(lambda: step(tokens), 20))
        step(tokens).item()
        state.hold = lambda call: True  # type: ignore[method-assign]
        without.append(_us(lambda: step(tokens), 20))
        del state.hold
        step(tokens).item()
    modules = sum(1 for _ in model.modules())
    assert variant is step._last
    return {
        "layers": num_layers,
        "modules": modules,
        "conditions_us": median(hold),
        "us_a_module": median(hold) / modules,
        "signature_us": median(plain),
        "call_us": median(with_conditions),
        "call_without_us": median(without),
    }


def _us(call: Callable[[], Any], times: int = CALLS) -> float:
    """Returns the median time of one call in microseconds."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append((time.perf_counter() - started) * 1e6)
    return median(found)


def draw(rows: list[dict[str, Any]]) -> Axes:
    """Returns the time that conditions take over the number of modules."""
    axes = panel("modules", "conditions, us a call")
    axes.plot([row["modules"] for row in rows], [row["conditions_us"] for row in rows], "o-")
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--layers", type=numbers, default=[1, 4, 12], help="numbers of layers; the recipe's has 4")
    given = parser.parse_args()
    results = run(given.layers, given.repeats)
    print_table(list(results["rows"][0]), [list(row.values()) for row in results["rows"]])
    finish("conditions", results, draw(results["rows"]), print_json=given.json)


if __name__ == "__main__":
    main()
