"""JAX, one of several processes that each compute for themselves, for benchmarks.tenancy.

The lines, and what a computation is: tenant.py. Nobody shares the cores out but the system.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# A computation has one thread, as ours.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import argparse
import json
import sys
import time

import jax
import jax.numpy as jnp
import protocol
from protocol import MATRIX

#: Calls that may be in flight: as many as a client of ours may have.
AHEAD = 64


class Tenant:
    version = f"jax {jax.__version__}"

    def __init__(self) -> None:
        self._ones = jnp.ones((MATRIX, MATRIX), jnp.float32)
        self._functions = {}

    def prepare(self, loops: int) -> dict[str, float]:
        self._functions[loops] = jax.jit(
            lambda ones: jax.lax.fori_loop(0, loops, lambda _, m: (m @ ones) * (1 / MATRIX), ones).max()
        )
        self._call(loops, 5)
        started = time.perf_counter()
        self._call(loops, 50)
        return {"seconds": (time.perf_counter() - started) / 50}

    def _call(self, loops: int, count: int) -> None:
        results = [self._functions[loops](self._ones) for _ in range(count)]
        assert float(results[-1]) == 1

    def flood(self, loops: int, seconds: float) -> dict[str, float]:
        function, count, began, results = self._functions[loops], 0, time.time(), []
        while time.time() < began + seconds:
            results.append(function(self._ones))
            count += 1
            if len(results) == AHEAD:
                results.pop(0).block_until_ready()
        jax.block_until_ready(results)
        return {"computations": count, "began": began, "ended": time.time()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=1, help="one")
    parser.parse_args()
    lines = protocol.claim_stdout()
    tenant = Tenant()
    print(json.dumps({"ready": True, "version": tenant.version}), file=lines, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(tenant, request.pop("do"))(**request)), file=lines, flush=True)


if __name__ == "__main__":
    main()
