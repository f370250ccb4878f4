"""torchways, one of several clients with the same devices, for benchmarks.tenancy.

A computation is `loops` dependent products of 128 x 128 float32 matrices on one thread. A worker is one client of the
cluster that TORCHWAYS_ADDRESS names, with a slice of the first device of island 0. It says
`{"ready": true, "version": "..."}`, then reads one JSON object a line and answers with one line:

    {"do": "prepare", "loops": L}                           -> {"seconds": s}   of one computation, of many in a row
    {"do": "flood", "loops": L, "seconds": S}               -> {"computations": n, "began": t, "ended": t}
        keeps calls in flight for S seconds, then waits for the last; times are Unix seconds
    {"do": "probe", "loops": L, "seconds": S, "pause": P}   -> {"waits": [s, ...]}
        calls and reads the result, then does nothing for P to 2 P seconds
"""

import argparse
import json
import random
import sys
import time

import protocol
import torch
from protocol import MATRIX

import torchways as tw


def computation(loops):
    def work(ones):
        """All-ones matrices over their side stay all ones: the result is 1."""
        m = ones
        for _ in range(loops):
            m = (m @ ones) * (1 / MATRIX)
        return m.max()

    return work


class Tenant:
    version = f"torchways {tw.__version__}"

    def __init__(self, weight: float, priority: int) -> None:
        tw.init(weight=weight, priority=priority)
        self._mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
        self._ones = tw.distribute_tensor(torch.ones(MATRIX, MATRIX), self._mesh)
        self._functions = {}

    def prepare(self, loops: int) -> dict[str, float]:
        self._functions[loops] = tw.function(computation(loops), mesh=self._mesh)
        self.call(loops, 5)
        started = time.perf_counter()
        self.call(loops, 50)
        return {"seconds": (time.perf_counter() - started) / 50}

    def call(self, loops: int, count: int) -> None:
        for _ in range(count):
            result = self._functions[loops](self._ones)
        assert result.item() == 1

    def flood(self, loops: int, seconds: float) -> dict[str, float]:
        function, count, began = self._functions[loops], 0, time.time()
        while time.time() < began + seconds:
            result = function(self._ones)
            count += 1
        assert result.item() == 1
        return {"computations": count, "began": began, "ended": time.time()}

    def probe(self, loops: int, seconds: float, pause: float) -> dict[str, list[float]]:
        waits, ends = [], time.time() + seconds
        while time.time() < ends:
            time.sleep(pause * random.uniform(1, 2))
            started = time.perf_counter()
            assert self._functions[loops](self._ones).item() == 1
            waits.append(time.perf_counter() - started)
        return {"waits": waits}


def serve(tenant) -> None:
    """Answers requests until EOF."""
    lines = protocol.claim_stdout()
    print(json.dumps({"ready": True, "version": tenant.version}), file=lines, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(tenant, request.pop("do"))(**request)
        print(json.dumps(answer), file=lines, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=1, help="one")
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--priority", type=int, default=0)
    arguments = parser.parse_args()
    serve(Tenant(arguments.weight, arguments.priority))
    tw.shutdown()


if __name__ == "__main__":
    main()
