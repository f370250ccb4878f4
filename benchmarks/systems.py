"""Systems under test, each a worker process that speaks the protocol of peers/protocol.py."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"
#: Where peers/install.sh makes the environments.
ENVIRONMENTS = Path(os.environ.get("TORCHWAYS_PEERS", ".peers"))

MODES = ("op", "chained", "fused")
_START_SECONDS = 180.0
_ANSWER_SECONDS = 180.0
_END_SECONDS = 20.0


@dataclass(frozen=True)
class SystemSpec:
    """How to start a system.

    Attributes:
        name: in tables.
        script: of peers/.
        environment: that it runs in; None: this one.
        flags: of the script.
        modes: what it is asked for.
        is_alone: it keeps the processor busy while idle, so nothing else is measured while it lives.
    """

    name: str
    script: str
    environment: str | None = None
    flags: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    is_alone: bool = False

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        return ENVIRONMENTS / self.environment / "bin/python" if self.environment else Path(sys.executable)


OURS = SystemSpec("torchways", "torchways_controller.py")
OURS_WAITING = SystemSpec("torchways, waiting", "torchways_controller.py", flags=("--wait",), modes=("op",))
TORCH_XLA = SystemSpec("torch-xla", "torch_xla_direct.py")
TORCH_XLA_COMPILED = SystemSpec("torch-xla compiled", "torch_xla_direct.py", flags=("--compiled",))
JAX = SystemSpec("jax", "jax_controllers.py", "jax")
RAY = SystemSpec("ray", "ray_actors.py", "ray")
RAY_WAITING = SystemSpec("ray, waiting", "ray_actors.py", "ray", ("--wait",), ("op",))
RAY_COMPILED = SystemSpec("ray compiled", "ray_actors.py", "ray", ("--compiled",), is_alone=True)
MONARCH = SystemSpec("monarch", "monarch_actors.py", "monarch")
MONARCH_WAITING = SystemSpec("monarch, waiting", "monarch_actors.py", "monarch", ("--wait",), ("op",))
ALL = (OURS, OURS_WAITING, TORCH_XLA, TORCH_XLA_COMPILED, JAX, RAY, RAY_WAITING, RAY_COMPILED, MONARCH, MONARCH_WAITING)


class System:
    """A running system; `ask` sends a request and waits for its answer."""

    def __init__(self, spec: SystemSpec, hosts: int) -> None:
        self.spec = spec
        command = [str(spec.python), str(PEERS / spec.script), "--hosts", str(hosts), *spec.flags]
        # What libraries chatter goes to a file: a pipe that nobody reads would stop them.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.version: str = self._answer(_START_SECONDS)["version"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request: {"computations", "seconds"}, {"unsupported"} or {"error"}."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer(_ANSWER_SECONDS)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"{self.spec.name} did not answer in {seconds:g} s")
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-20:])
            raise RuntimeError(f"{self.spec.name} ended with code {self._process.wait(5)}; it wrote last:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends it: EOF, then by force."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def running(specs: Sequence[SystemSpec], hosts: int) -> Iterator[list[System]]:
    """Starts systems, one after the other, and ends them; says which are not installed or do not start."""
    systems: list[System] = []
    try:
        for spec in specs:
            if not spec.python.exists():
                print(f"{spec.name}: not installed; run benchmarks/peers/install.sh", file=sys.stderr)
                continue
            try:
                systems.append(System(spec, hosts))
            except (RuntimeError, TimeoutError) as error:
                print(f"{spec.name} at {hosts} hosts: {error}", file=sys.stderr)
        yield systems
    finally:
        for system in systems:
            system.close()


def calls_for(system: System, request: dict[str, Any], seconds: float) -> int:
    """Returns how many calls of a kind take about `seconds`; 0 if the system does not do this kind."""
    calls = 2
    for _ in range(6):
        answer = system.ask({**request, "calls": calls})
        if "seconds" not in answer:
            print(f"{system.spec.name} {request}: {answer}", file=sys.stderr)
            return 0
        if answer["seconds"] >= seconds / 2:
            break
        calls = max(calls + 1, min(calls * 16, int(calls * seconds / max(answer["seconds"], 1e-6))))
    return max(1, int(calls * seconds / answer["seconds"]))


def measure(systems: Sequence[System], request: dict[str, Any], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Returns computations a second of each system that does this kind, measured in turn: A B C A B C ..."""
    systems = [system for system in systems if request["mode"] in (*system.spec.modes, "work")]
    calls = {system: calls_for(system, request, seconds) for system in systems}
    found: dict[str, list[float]] = {system.spec.name: [] for system in systems if calls[system]}
    for _ in range(repeats):
        for system in systems:
            if calls[system]:
                answer = system.ask({**request, "calls": calls[system]})
                found[system.spec.name].append(answer["computations"] / answer["seconds"])
    return found
