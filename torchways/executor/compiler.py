"""Compiles programs on threads of its own, while the engine goes on with other runs.

Programs are compiled in order; the computations of one program are compiled at the same time, as cores allow.

torch-xla's lazy trace must not run beside computations, so it runs on the engine's thread. It is quick, but of several
devices places zeros of the inputs' sizes, which for gigabytes takes seconds. Everything else runs here. Reading a graph
is Python and shares the GIL with the engine. XLA's compilation takes neither the GIL nor the device lock, so
computations are launched and end meanwhile.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torchways.errors import CaptureError, Failure, failure_from
from torchways.executor.failures import Failures
from torchways.executor.plan import Unit
from torchways.ir.part import ComputeInstruction, Slot
from torchways.ir.program import Function
from torchways.runtime.base import BufferSpec, OnDevice, Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One computation of a unit, ready to run.

    Attributes:
        executable: the runtime's.
        inputs, outputs: slots.
        dead: slots that nothing reads after it.
        function_index: position in `SlicePart.functions`.
    """

    executable: Any
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    dead: tuple[Slot, ...]
    function_index: int


class Compiler:
    """See the module's docstring.

    Args:
        runtime: compiles.
        on_device: runs work on the engine's thread and waits for it.
        failure: makes a failure of this process.

    Attributes:
        num_compiled: functions compiled since the start; equal functions are compiled once.
        seconds: time spent on that.
    """

    def __init__(self, runtime: Runtime, on_device: OnDevice, failure: Failures) -> None:
        self._runtime = runtime
        self._on_device = on_device
        self._failure = failure
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="compiler")
        self._workers = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compiler-worker")
        self._counting = threading.Lock()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.num_compiled = 0
        self.seconds = 0.0

    def submit(self, work: Callable[[], None]) -> None:
        """Runs `work`, which must not raise, on the thread; in order."""
        self._thread.submit(work)

    def compile_units(
        self, name: str, functions: Sequence[Function], slots: Sequence[BufferSpec], units: Sequence[Unit]
    ) -> dict[int, list[Call]] | Failure:
        """Compiles the computations of a program's part; on the thread.

        Args:
            name: the program's name.
            functions, slots: of the part.
            units: all units of the part.

        Returns:
            the calls of each unit that computes, by the unit's number; or the first failure.
        """
        computing = [[step for step in unit.instructions if isinstance(step, ComputeInstruction)] for unit in units]
        compiled: dict[Any, concurrent.futures.Future[Any]] = {}
        for step in (step for steps in computing for step in steps):
            if (key := _key(step, slots)) not in compiled:
                function = functions[step.function_index]
                compiled[key] = self._workers.submit(self._compile, name, function, slots, step)
        results = {key: future.result() for key, future in compiled.items()}
        failure = next((result for result in results.values() if isinstance(result, Failure)), None)
        if failure is not None:
            return failure
        calls: dict[int, list[Call]] = {}
        for number, (unit, steps) in enumerate(zip(units, computing, strict=True)):
            last_use: dict[int, int] = {}
            for index, step in enumerate(steps):
                last_use.update((slot, index) for slot in (*step.inputs, *step.outputs))
            for index, step in enumerate(steps):
                dead = [slot for slot, last in last_use.items() if last == index and slot not in unit.writes]
                executable = results[_key(step, slots)]
                calls.setdefault(number, []).append(
                    Call(executable, step.inputs, step.outputs, tuple(dead), step.function_index)
                )
        return calls

    def _compile(self, name: str, function: Function, slots: Sequence[BufferSpec], step: ComputeInstruction) -> Any:
        started = time.monotonic()
        try:
            executable = self._runtime.compile(
                function.graph,
                [slots[slot] for slot in step.inputs],
                [slots[slot] for slot in step.outputs],
                step.donated,
                self._on_device,
            )
        except CaptureError as error:
            failure = failure_from(error)
            return self._failure(failure.kind, failure.message)
        except Exception as error:
            message = f"compiled function {function.name} could not be compiled: {error}"
            return self._failure("RemoteError", message, error, function.name, function.source)
        seconds = time.monotonic() - started
        with self._counting:
            if executable in self._known:
                return executable
            self._known.add(executable)
            self.num_compiled += 1
            self.seconds += seconds
        logger.info("compiled %s of program %s in %.2f s", function.name, name, seconds)
        return executable


def _key(step: ComputeInstruction, slots: Sequence[BufferSpec]) -> Any:
    """Returns a key that is equal for computations of which one compilation serves all."""
    kinds = (tuple(slots[slot] for slot in side) for side in (step.inputs, step.outputs))
    return (step.function_index, *kinds, tuple(step.donated))
